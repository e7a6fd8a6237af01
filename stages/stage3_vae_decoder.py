"""Stage 3: decode the latents to pictures, by diffusers' VAE, compiled or as PyTorch runs it.

    python stages/stage3_vae_decoder.py
    python stages/stage3_vae_decoder.py --image_format webp

Reads   generation_config.json, stage2_latents.safetensors, the checkpoint's VAE (nothing else);
        stage0_latents.safetensors where what was masked is pasted into the pictures begun with.
Writes  output_image.png when there is one image; output_image_0000.png … and output_grid.png when
        there are several, each as soon as it is decoded, with all settings in its metadata
        output_trajectory.png, .webp   a strip and an animation, where stage 2 saved a trajectory
        images.jsonl, a line for each picture; stage3_report.json
Takes   some seconds for the demo checkpoint on a CPU, where PyTorch decodes.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.stopping import stop_at_once_on_signals

if __name__ == "__main__":  # the other imports take a second
    stop_at_once_on_signals()

from common.compute.backends import TORCH_FACTS, Backend
from common.files import artifacts
from common.files.artifacts import Artifact
from common.files.contracts import header_misfit, latents_misfit, latents_shapes
from common.files.stage_table import DECODE
from common.messages import say
from common.models.checkpoint import Checkpoint
from common.runs.generation import GenerationConfig
from common.runs.image_latents import find_pasted_into
from common.runs.picture_writer import PictureWriter
from common.runs.pictures import Found, PictureFacts, Pictures, why_pictures_stale
from common.runs.recipes import expected_vae_dtype, find_trajectory, pictures_recipe
from common.runs.stage_run import StageRun, run_script
from common.runs.streaming import decode_beside

if TYPE_CHECKING:
    from common.vae.decoder import Decoder

Inputs = tuple[Artifact, Artifact | None, Artifact | None]  # latents, trajectory, pasted into


def main(run: StageRun) -> None:
    """Decode the latents with the checkpoint's VAE and save the pictures."""
    # 1. Settings: the run's, and what the flags override for this run of this stage
    config, checkpoint = run.read_settings()
    beside = decode_beside(run, config, checkpoint)  # with --stream, while stage 2 runs

    # 2. The input, whole and fitting; and are the pictures fresh already?
    latents = run.inspect_input()  # [B, C, h, w]
    misfit = latents_misfit(latents, checkpoint.config("vae")) or header_misfit(latents)
    artifacts.refuse_misfit(latents, misfit or artifacts.inputs_misfit(latents))
    expected = beside.dtype if beside else expected_vae_dtype(config.vae_dtype, run.run_dir)
    begun = find_pasted_into(config, checkpoint, run.source_dir, verify=run.options.verify)
    recipe = pictures_recipe(config, checkpoint, latents, expected, begun)
    trajectory = find_trajectory(run.source_dir, latents, verify=run.options.verify)
    pictures = Pictures.of(config, recipe, latents, begun)
    found = Found(run.run_dir, pictures.names, beside)
    stale = why_pictures_stale(found, pictures, trajectory)
    if run.is_fresh(stale or run.options.why_measure(), run.run_dir / pictures.main):
        return None
    run.begin(f"decode {len(pictures.rows)} image(s)")

    # 3. Start the backend: PyTorch on CPUs, else jax
    backend = run.start_backend(torch_on_cpus=True)
    run.import_libraries("peft", "scipy", "transformers")
    backend.import_vae()
    run.report.phase("other")
    return decode(run, config, checkpoint, (latents, trajectory, begun), found, backend)


def decode(
    run: StageRun,
    config: GenerationConfig,
    checkpoint: Checkpoint,
    inputs: Inputs,
    found: Found,
    backend: Backend,
) -> None:
    """The part of the story that takes time; `found` are the pictures that the folder has."""
    # 4. What is to be decoded: all, or what no earlier run has made
    latents, trajectory, begun = inputs
    dtype = backend.choose_dtype(config.vae_dtype, force_float32=checkpoint.upcasts_vae)
    recipe = pictures_recipe(config, checkpoint, latents, dtype, begun)
    pictures = Pictures.of(config, recipe, latents, begun)
    facts = PictureFacts(config=config, header=latents.header, overrides=run.overrides)
    writer = PictureWriter(run.run_dir, pictures, facts, run.report)
    if run.takes_rows:
        writer.take_all(found, run.asked_for(len(pictures.rows)))
    computed = dict(TORCH_FACTS if found.beside is None else found.beside.facts)
    if writer.missing or trajectory is not None:
        from common.vae.loading import VaeToLoad, open_decoder

        vae = VaeToLoad(checkpoint=checkpoint, dtype=dtype, tile=config.tile)
        shapes = latents_shapes(latents)  # [B, C, h, w] of each size
        decoder = open_decoder(run.kept, backend.name, vae, shapes, run.options, run.report)
        run.keep_progress(recipe, decoder.runner.facts())
        if not run.takes_rows:
            writer.take_done(found, run.progress)
        computed = decode_missing(run, decoder, inputs, writer, writes=backend.is_first_process)
    if not backend.is_first_process:
        say("  the first process writes")
        return

    # 6. The grids of all, and the report
    main_picture = writer.finish()
    run.settings_written(config)
    run.finish(
        main_picture,
        shapes=writer.shapes,
        rows_taken=len(writer.taken) - writer.made_beside,
        dtype=dtype,
        dtype_asked=config.vae_dtype,
        versions=recipe.versions,
        recipe=recipe.model_dump(),
        **computed,
    )


def decode_missing(
    run: StageRun, decoder: "Decoder", inputs: Inputs, writer: PictureWriter, *, writes: bool
) -> dict[str, Any]:
    """Decode and write what is not there. Returns what the report says of how it was computed."""
    from common.vae.decoding import Latents, decode_groups, decode_trajectory, grouped, measure
    from common.vae.pasting import PastedInto

    # 5. Decode and write, group by group; a stopped run goes on from what it wrote
    latents, trajectory = Latents.of(inputs[0]), inputs[1]
    into = PastedInto.of(inputs[2], writer.pictures.prompt_of)
    groups = grouped(decoder, latents, writer.missing, run.options)
    with run.finishing_first(keeps=len(groups) > 1 and run.progress is not None) as stop:
        for group, pixels in decode_groups(decoder, latents, groups, run.options):
            writer.made_by = run.options.made_by(decoder.runner.facts(), group.size)
            if writes:
                writer.put(group.own, into.paste(group.own, pixels), run.progress, stop)
    profile = measure(decoder, latents, run.options, run.profile_folder)
    if trajectory is not None:
        kept = run.load_input(trajectory)["latents"].float().numpy()  # [S, B, C, h, w]
        strip, frames = decode_trajectory(decoder, kept, run.options)
        if writes:
            writer.write_trajectory(strip, frames, trajectory)
    return decoder.runner.facts() | {"profile": profile}


if __name__ == "__main__":
    run_script(DECODE, main)
