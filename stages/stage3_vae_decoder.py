"""Stage 3: decode the latents to pictures, by diffusers' VAE, compiled or as PyTorch runs it.

    python stages/stage3_vae_decoder.py
    python stages/stage3_vae_decoder.py --image_format webp

Reads   generation_config.json, stage2_latents.safetensors, the checkpoint's VAE (nothing else);
        stage0_latents.safetensors where what was masked is pasted into the pictures begun with.
Writes  output_image.png when there is one image; output_image_0000.png … and output_grid.png when
        there are several; all settings in their metadata, as the latents' header records them
        output_trajectory.png, output_trajectory.webp   where stage 2 saved a trajectory: a strip,
        and an animation
        stage3_report.json
Takes   some seconds for the demo checkpoint on a CPU, where PyTorch decodes.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.compute.backends import Backend
from common.files import artifacts
from common.files.artifacts import Artifact
from common.files.contracts import header_misfit, latents_misfit
from common.files.picture_files import picture_names
from common.files.stage_table import DECODE
from common.messages import say
from common.models.checkpoint import Checkpoint
from common.runs.generation import GenerationConfig
from common.runs.image_latents import find_image_latents
from common.runs.outputs import Decoded, PictureFacts, save_pictures
from common.runs.recipes import (
    expected_vae_dtype,
    find_trajectory,
    pictures_recipe,
    why_pictures_stale,
)
from common.runs.stage_run import StageRun, run_script


def main(run: StageRun) -> None:
    """Decode the latents with the checkpoint's VAE and save the pictures."""
    if run.given.flags.topology is not None:  # compile for a TPU that is not there, and run nothing
        from common.runs.topology import estimate_decoding

        return estimate_decoding(run.given)

    # 1. Settings: the run's, and what the flags override for this run of this stage
    config, checkpoint = run.read_settings()

    # 2. The input, whole and fitting; and are the pictures fresh already?
    latents = run.inspect_input()  # [B, C, h, w]
    misfit = latents_misfit(latents.tensors, checkpoint.config("vae")) or header_misfit(latents)
    artifacts.refuse_misfit(latents, misfit or artifacts.inputs_misfit(latents))
    count = latents.tensors["latents"].shape[0]
    expected = expected_vae_dtype(config.vae_dtype, run.run_dir)
    verify = not run.options.no_verify
    begun = None  # the pictures that these are pasted into
    if config.pastes:
        begun = find_image_latents(config, checkpoint, run.source_dir, verify=verify)
    recipe = pictures_recipe(config, checkpoint, latents, expected, begun)
    trajectory = find_trajectory(run.source_dir, latents, verify=verify)
    names, grid = picture_names(count, config.image_format)
    stale = why_pictures_stale(run.run_dir, [*names, *([grid] if grid else [])], recipe, trajectory)
    if run.is_fresh(stale or run.options.why_measure(), run.run_dir / (grid or names[0])):
        return None
    run.begin(f"decode {count} image(s)")

    # 3. Start the backend: PyTorch on CPUs, else jax
    backend = run.start_backend(torch_on_cpus=True)
    run.import_libraries("peft", "scipy", "transformers")
    backend.import_vae()
    run.report.phase("other")
    return decode(run, config, checkpoint, (latents, trajectory, begun), backend)


def decode(
    run: StageRun,
    config: GenerationConfig,
    checkpoint: Checkpoint,
    inputs: tuple[Artifact, Artifact | None, Artifact | None],
    backend: Backend,
) -> None:
    """The part of the story that takes time.

    Args:
        inputs: latents, their trajectory, and the pictures that these are pasted into.
    """
    from common.vae.decoding import decode_groups, decode_trajectory, measure
    from common.vae.loading import VaeToLoad, open_decoder
    from common.vae.pasting import paste

    # 4. Decode, group by group; a stopped run goes on from what it kept
    latents, trajectory, begun = inputs
    tensor = run.load_input(latents)["latents"].float().numpy()  # [B, C, h, w]
    dtype = backend.choose_dtype(config.vae_dtype, force_float32=checkpoint.upcasts_vae)
    vae = VaeToLoad(checkpoint=checkpoint, dtype=dtype, tile=config.tile)
    decoder = open_decoder(run.kept, backend.name, vae, tensor.shape, run.options, run.report)
    recipe = pictures_recipe(config, checkpoint, latents, dtype, begun)
    devices = decoder.runner.facts()
    run.keep_progress(recipe, devices)
    several = len(tensor) > decoder.runner.group_size(len(tensor), run.options)
    with run.finishing_first(keeps=several and run.progress is not None) as stop:
        images = decode_groups(decoder, tensor, run.options, progress=run.progress, stop=stop)
    profile = measure(decoder, tensor, run.options, run.profile_folder)
    if begun is not None:
        images = paste(images, run.load_input(begun))
    decoded = Decoded(images=images)
    if trajectory is not None:
        kept = run.load_input(trajectory)["latents"].float().numpy()  # [S, B, C, h, w]
        strip, frames = decode_trajectory(decoder, kept, run.options)
        decoded = Decoded(images=images, strip=strip, frames=frames)
    if not backend.is_first_process:
        say("  the first process writes")
        return

    # 5. Write
    facts = PictureFacts(
        config=config, header=latents.header, recipe=recipe, overrides=run.overrides
    )
    main_picture = save_pictures(run.run_dir, decoded, facts, trajectory, run.report)
    run.settings_written(config)
    run.finish(
        main_picture,
        shapes={"images": list(images.shape)},
        dtype=dtype,
        dtype_asked=config.vae_dtype,
        versions=recipe.versions,
        recipe=recipe.model_dump(),
        profile=profile,
        **devices,
    )


if __name__ == "__main__":
    run_script(DECODE, main)
