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

from common.models.library_imports import quiet_libraries

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
    from common.compute.clock import StageReport
    from common.compute.kept import Kept
    from common.compute.options import RunOptions
    from common.conditions.prompts import encode_prompts
    from common.declared import EMBEDDINGS, LATENTS
    from common.files.made_rows import MadeRows
    from common.models.component_table import loaded_for
    from common.models.find import open_checkpoint
    from common.models.text_pipeline import load_text_pipeline
    from common.runs.generation import RunSettings, resolve
    from common.runs.jobs import denoising_job, make_sampler
    from common.sampling.denoising import denoise_images
    from common.sampling.loading import UNetToLoad, open_denoiser

    jax_start.set_up_jax()
    components = (*loaded_for(EMBEDDINGS), *loaded_for(LATENTS))
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
    unet, kept = UNetToLoad(checkpoint=checkpoint, loras=(), dtype=dtype), Kept(len(meshes))

    seconds: dict[tuple[str, str], list[float]] = {}
    for round_number in tqdm(range(repeat + 1), desc="repetitions"):
        for mesh_name, options in meshes.items():
            for way, config in configs.items():
                sampler = make_sampler(config, checkpoint)
                job = denoising_job(config, checkpoint, embeddings, sampler)
                denoiser = open_denoiser(kept, "jax", unet, [job], options, report)
                before = report.parts().get("run", 0.0)
                denoise_images(
                    lambda _, own=denoiser: own, [job], options, MadeRows.numbered(len(job.seeds))
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
