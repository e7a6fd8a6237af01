"""How much faster the steps without guidance are, on one machine and in one run.

    python benchmarks/guidance.py                       # the demo checkpoint, batch 4
    python benchmarks/guidance.py --mesh single --mesh auto

Measures the denoising loop alone (stage 2's part "run"), everything compiled and warmed up before:
full guidance, guidance for the first half of the steps, and none, under each mesh, interleaved; the
median of the repetitions, the ratio to full guidance under the same mesh and under the first one.
"""

import statistics
import sys
from pathlib import Path
from typing import Annotated

PROJECT_DIR = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT_DIR))

import typer
from tqdm import tqdm

from common.models.weights import quiet_libraries

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
    mesh: Annotated[list[str] | None, typer.Option("--mesh", help="As stage 2's.")] = None,
) -> None:
    """Print the median seconds of the denoising loop and the ratios."""
    quiet_libraries()
    import torch

    from common.compute import jax_start
    from common.conditions.prompts import encode_prompts
    from common.files.report import StageReport
    from common.models.checkpoint import open_checkpoint
    from common.models.weights import load_text_pipeline
    from common.runs.generation import RunOptions, RunSettings, resolve
    from stages import stage1_text_encoder, stage2_unet

    jax_start.set_up_jax()
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
    dtype = "float32" if jax_start.platform() == "cpu" else "bfloat16"
    meshes = {name: RunOptions(batch_size=batch, mesh=name) for name in mesh or ["auto"]}
    report = StageReport(2)
    denoisers = {
        name: stage2_unet.load_denoiser("jax", base, checkpoint, dtype, options, report)
        for name, options in meshes.items()
    }

    seconds: dict[tuple[str, str], list[float]] = {}
    for round_number in tqdm(range(repeat + 1), desc="repetitions"):
        for mesh_name, denoiser in denoisers.items():
            for way, config in configs.items():
                before = report.parts().get("run", 0.0)
                options = meshes[mesh_name]
                sampler = stage2_unet.make_sampler(config, checkpoint)
                stage2_unet.denoise_images(
                    config, checkpoint, embeddings, denoiser, sampler, options
                )
                if round_number:  # the first round compiles and warms up
                    taken = report.parts()["run"] - before
                    seconds.setdefault((mesh_name, way), []).append(taken)

    print(f"{model_id}, batch {batch}, {steps} steps, {dtype}, {jax_start.platform()}:")
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    full = next(iter(WAYS))
    for (mesh_name, way), median in medians.items():
        own, first = medians[mesh_name, full] / median, next(iter(medians.values())) / median
        least = min(seconds[mesh_name, way])
        print(
            f"  {mesh_name:10} {way:17} {median:6.2f} s (least {least:.2f})  {own:4.2f} x its full "
            f"guidance, {first:4.2f} x the first"
        )


if __name__ == "__main__":
    typer.run(main)
