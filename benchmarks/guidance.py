"""How much faster the steps without guidance are, on one machine and in one run.

    python benchmarks/guidance.py                       # the demo checkpoint, batch 4

Measures the denoising loop alone (stage 2's part "run"), everything compiled and warmed up before:
full guidance, guidance for the first half of the steps, and none, interleaved; the median of the
repetitions and the ratios to full guidance.
"""

import statistics
import sys
from pathlib import Path
from typing import Annotated

PROJECT_DIR = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT_DIR))

import typer
from tqdm import tqdm

from common.components import quiet_libraries

WAYS = {
    "full guidance": {},
    "guidance_end 0.5": {"guidance_end": 0.5},
    "guidance_scale 1": {"guidance_scale": 1.0},
}


def main(
    model_id: Annotated[str, typer.Option("--model_id", help="Checkpoint.")] = "models/demo",
    batch: Annotated[int, typer.Option("--batch", help="Pictures at once.", min=1)] = 4,
    steps: Annotated[int, typer.Option("--num_inference_steps", help="Steps.", min=2)] = 20,
    repeat: Annotated[int, typer.Option("--repeat", help="Repetitions of each.", min=1)] = 7,
) -> None:
    """Print the median seconds of the denoising loop and the ratios."""
    quiet_libraries()
    import torch

    from common import jax_setup
    from common.checkpoint import open_checkpoint
    from common.components import load_text_pipeline
    from common.config import RunOptions, RunSettings, resolve
    from common.prompts import encode_prompts
    from common.report import StageReport
    from stages import stage1_text_encoder, stage2_unet

    jax_setup.set_up_jax()
    components = stage1_text_encoder.COMPONENTS + stage2_unet.COMPONENTS
    settings = RunSettings(
        model_id=model_id,
        num_images_per_prompt=batch,
        num_inference_steps=steps,
        guidance_scale=7.5,
    )
    checkpoint = open_checkpoint(settings, components)
    base = resolve(
        settings, native_size=checkpoint.native_size, size_factor=checkpoint.vae_scale_factor
    )
    configs = {name: base.model_copy(update=changes) for name, changes in WAYS.items()}
    pipeline = load_text_pipeline(checkpoint, torch.float32)
    embeddings = encode_prompts(pipeline, base)
    dtype = jax_setup.choose_dtype("auto")
    options = RunOptions(batch_size=batch)
    report = StageReport(2)
    denoiser = stage2_unet.load_denoiser(
        base, checkpoint, dtype, options, report, jax_setup.Programs()
    )

    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for round_number in tqdm(range(repeat + 1), desc="repetitions"):
        for name, config in configs.items():
            before = report.seconds.get("run", 0.0)
            stage2_unet.denoise_images(config, checkpoint, embeddings, denoiser, options)
            if round_number:  # the first round compiles and warms up
                seconds[name].append(report.seconds["run"] - before)

    full = statistics.median(seconds["full guidance"])
    print(f"{model_id}, batch {batch}, {steps} steps, {dtype}, {jax_setup.platform()}:")
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"  {name:17}  {median:6.2f} s  {full / median:4.2f} x  (min {min(values):.2f})")


if __name__ == "__main__":
    typer.run(main)
