"""Stage 2: denoise, by diffusers' UNet compiled for TPU, GPU or CPU, or as PyTorch runs it.

    python stages/stage2_unet.py
    python stages/stage2_unet.py --num_inference_steps 30 --mesh data=4

Reads   generation_config.json, stage1_embeddings.safetensors, stage0_latents.safetensors where the
        run begins with pictures, the checkpoint's UNet and scheduler settings (no text encoder).
Writes  stage2_latents.safetensors   latents [B, C, h, w] float32, as the sampler leaves them
        stage2_trajectory.safetensors   with --save_trajectory N: the latents [S, B, C, h, w] after
                                     every N steps, and the numbers of those steps [S]
        stage2_report.json
Takes   some seconds for the demo checkpoint on a CPU once compiled.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.stopping import stop_at_once_on_signals

if __name__ == "__main__":  # the other imports take a second
    stop_at_once_on_signals()

from common.compute.backends import TORCH_FACTS, Backend
from common.errors import listed
from common.files import artifacts
from common.files.artifacts import Artifact
from common.files.contracts import embeddings_misfit
from common.files.made_rows import MadeRows
from common.files.row_reader import RowReader
from common.files.stage_table import DENOISE, LATENTS_FILE
from common.messages import say, warn
from common.models.checkpoint import Checkpoint
from common.runs.generation import GenerationConfig
from common.runs.image_latents import find_image_latents
from common.runs.init_latents import find_init_latents
from common.runs.jobs import (
    denoising_jobs,
    make_sampler,
    packages_to_spare,
    refuse_unfit_inputs,
    say_steps,
    warn_of_settings,
)
from common.runs.outputs import provenance_of_latents, write_latents
from common.runs.parts import Part, check_sizes, parts_of, refuse_several
from common.runs.recipes import (
    expected_unet_dtype,
    latents_recipe,
    latents_rows,
    prompts_misfit,
    why_latents_stale,
)
from common.runs.stage_run import StageRun, run_script


def main(run: StageRun) -> None:
    """Denoise latents with the checkpoint's UNet, by one compiled program or by PyTorch."""
    path = run.run_dir / LATENTS_FILE
    # 1. Settings: the run's, and what the flags override for this run of this stage
    config, checkpoint = run.read_settings()
    parts = parts_of(config)  # images with the same settings
    check_sizes(config, parts, checkpoint.vae_scale_factor)
    for part in parts:
        refuse_unfit_inputs(part.config, checkpoint)
    if run.options.save_trajectory is not None:
        refuse_several(parts, "--save_trajectory")

    # 2. The input, whole and fitting; and are the latents fresh already?
    embeddings = run.inspect_input()  # [P, L, D], pooled [P, E]
    misfit = embeddings_misfit(embeddings.tensors, len(config.prompts), checkpoint.config("unet"))
    artifacts.refuse_misfit(embeddings, prompts_misfit(embeddings.header, config) or misfit)
    verify = run.options.verify
    begin = find_image_latents(config, checkpoint, run.source_dir, verify=verify)  # [I, C, h, w]
    begin = begin or find_init_latents(config, checkpoint, run.run_dir, verify=verify)  # [B, …]
    expected = expected_unet_dtype(config.unet_dtype, path)
    recipe = latents_recipe(config, checkpoint, embeddings, expected, begin)
    if run.is_fresh(why_latents_stale(run.run_dir, recipe, run.options), path):
        return None
    sizes = dict.fromkeys(f"{part.config.width}×{part.config.height}" for part in parts)
    run.begin(f"denoise {len(config.image_seeds())} image(s), {listed([*sizes])}")
    configs = [part.config for part in parts]
    warn_of_settings(configs, checkpoint)

    # 3. Start the backend: jax, or PyTorch
    in_16_bits = config.unet_dtype not in ("auto", "float32")  # for which XLA is slow on CPUs
    backend = run.start_backend(torch_on_cpus=in_16_bits)
    run.import_libraries(*packages_to_spare(configs, checkpoint))
    backend.import_denoiser()
    run.report.phase("other")
    return denoise(run, (config, parts), checkpoint, (embeddings, begin), backend)


def denoise(
    run: StageRun,
    settings: tuple[GenerationConfig, list[Part]],
    checkpoint: Checkpoint,
    inputs: tuple[Artifact, Artifact | None],
    backend: Backend,
) -> None:
    """The part of the story that takes time; `inputs` are embeddings, and what is begun with."""
    from common.sampling.denoising import denoise_images, taken_images
    from common.sampling.loading import UNets, UNetToLoad

    # 4. What is to be denoised; what the steps refuse is said before weights are read
    (config, parts), (embeddings, begin) = settings, inputs
    with run.report.part("scheduler_tables"):
        samplers = [make_sampler(part.config, checkpoint) for part in parts]
    run.refuse_steps_to_profile(len(samplers[0].restart()))
    say_steps(samplers)
    dtype = backend.choose_dtype(config.unet_dtype)
    recipe = latents_recipe(config, checkpoint, embeddings, dtype, begin)
    recipes, path = latents_rows(config, recipe, *inputs), run.run_dir / LATENTS_FILE
    rows = run.find_rows(path, recipes, config)
    write = partial(write_latents, run, config, recipe, begin)
    if not rows.missing:  # they stand in another order, or some are gone
        if backend.is_first_process:
            write(taken_images(MadeRows(path, rows)), TORCH_FACTS)
        return

    # 5. Denoise, group by group; a stopped run goes on from what it kept
    given = None if begin is None else run.load_input(begin)
    texts = RowReader(embeddings, warn).tensors()
    jobs = denoising_jobs(config, checkpoint, texts, [*zip(parts, samplers, strict=True)], given)
    base = UNetToLoad(checkpoint=checkpoint, loras=(), dtype=dtype)
    unets = UNets(run.kept, backend.name, base, jobs, run.options, run.report)
    missing = {*rows.missing}
    first = next(job for job in jobs if not missing.isdisjoint(job.own))
    facts = unets.denoiser(first).facts()
    loops_on_device = unets.denoiser(first).loops_on_device
    run.keep_progress(recipe, facts, rows, loops_on_device=loops_on_device)
    if run.progress is None and run.options.checkpoint_every is not None:
        warn("--checkpoint_every has no effect with --profile, --repeat or --distributed")
    folder = run.profile_folder if run.options.profile else None
    with run.finishing_first(keeps=run.progress is not None) as stop:
        announced = provenance_of_latents(run, config, begin)  # to a stage 3 that runs beside
        made = MadeRows(path, rows, run.progress, (recipe, announced))
        denoised = denoise_images(
            *(unets.denoiser, jobs, run.options, made, run.seat), profile_folder=folder, stop=stop
        )
        if not backend.is_first_process:
            say("  the first process writes")
            return
        write(denoised, facts, stop)


if __name__ == "__main__":
    run_script(DENOISE, main)
