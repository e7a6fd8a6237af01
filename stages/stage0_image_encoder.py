"""Stage 0: encode the pictures that a run begins with, by diffusers' VAE.

    python stages/stage1_text_encoder.py --image star.png --prompt "a large green star"
    python stages/stage0_image_encoder.py

Only runs with pictures (`--image`) have it; stage 1 settles which, and their size.

Reads   generation_config.json, the pictures and masks, the checkpoint's VAE (nothing else).
Writes  stage0_latents.safetensors   image_latents_mean, image_latents_std [I, C, h, w] float32, the
                                     VAE's posterior of each picture, or of the one for all prompts;
                                     pictures [I, H, W, 3] uint8, as they were laid into the size;
                                     with masks the masked pictures' posterior and the masks
        stage0_report.json
Takes   some seconds for the demo checkpoint on a CPU, where PyTorch encodes.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.stopping import stop_at_once_on_signals

if __name__ == "__main__":  # the other imports take a second
    stop_at_once_on_signals()

from common.compute.backends import Backend
from common.errors import BadSettingError
from common.files import artifacts
from common.files.artifacts import MADE_BY
from common.files.stage_table import ENCODE, ENCODE_PICTURES, IMAGE_LATENTS_FILE
from common.messages import say
from common.models.checkpoint import Checkpoint
from common.runs.generation import GenerationConfig, check_size
from common.runs.image_latents import ReadInputs, image_tensors, read_inputs
from common.runs.recipes import (
    expected_vae_dtype,
    image_latents_recipe,
    image_latents_rows,
)
from common.runs.stage_run import StageRun, run_script


def main(run: StageRun) -> None:
    """Encode the pictures that a run begins with, by the checkpoint's VAE."""
    path = run.run_dir / IMAGE_LATENTS_FILE
    # 1. Settings: the run's, and what the flags override for this run of this stage
    config, checkpoint = run.read_settings()
    check_size(config, checkpoint.vae_scale_factor)
    if not config.has_pictures:
        raise BadSettingError(
            f"{run.source_dir} is a run without pictures: give --image to {ENCODE.command}"
        )

    # 2. The pictures, as 8-bit sRGB; and are their latents fresh already?
    inputs = read_inputs(config)
    expected = expected_vae_dtype(config.vae_dtype, run.run_dir, ENCODE_PICTURES)
    recipe = image_latents_recipe(config, checkpoint, inputs, expected)
    stale = artifacts.why_stale(path, recipe, verify=run.options.verify)
    if run.is_fresh(stale or run.options.why_measure(), path):
        return None
    run.begin(f"encode {len(inputs.pictures)} picture(s), {config.width}×{config.height}")

    # 3. Start the backend: PyTorch on CPUs, else jax
    backend = run.start_backend(torch_on_cpus=True)
    run.import_libraries("peft", "scipy", "transformers")
    backend.import_vae()
    run.report.phase("other")
    return encode(run, config, checkpoint, inputs, backend)


def encode(
    run: StageRun,
    config: GenerationConfig,
    checkpoint: Checkpoint,
    inputs: ReadInputs,
    backend: Backend,
) -> None:
    """The part of the story that takes time."""
    import numpy as np

    from common.vae.encoding import encode_groups, measure, split_by_parts
    from common.vae.loading import VaeToLoad, open_encoder

    # 4. Lay the pictures into the run's size
    laid = inputs.lay(config, checkpoint.vae_scale_factor)
    parts = laid.to_encode()  # each [I, 3, H, W]
    pictures = np.concatenate([*parts.values()])  # encoded as one

    # 5. Encode, group by group; a stopped run goes on from what it kept
    dtype = backend.choose_dtype(config.vae_dtype, force_float32=checkpoint.upcasts_vae)
    vae = VaeToLoad(checkpoint=checkpoint, dtype=dtype, tile=config.tile)
    encoder = open_encoder(run.kept, backend.name, vae, pictures.shape, run.options, run.report)
    recipe = image_latents_recipe(config, checkpoint, inputs, dtype)
    devices = encoder.runner.facts()
    run.keep_progress(recipe, devices)
    several = len(pictures) > encoder.runner.group_size(len(pictures), run.options)
    with run.finishing_first(keeps=several and run.progress is not None) as stop:
        found = encode_groups(encoder, pictures, run.options, progress=run.progress, stop=stop)
    profile = measure(encoder, pictures, run.options, run.profile_folder)
    if not backend.is_first_process:
        say("  the first process writes")
        return

    # 6. Write
    path = run.run_dir / IMAGE_LATENTS_FILE
    with run.report.part("writing"):
        encoded = split_by_parts(found, {name: len(part) for name, part in parts.items()})
        tensors = image_tensors(laid, inputs, encoded, checkpoint.vae_scale_factor)
        names = {"images": inputs.names, "mask_images": inputs.mask_names}
        size = encoder.runner.group_size(len(pictures), run.options)
        how = {"overrides": run.overrides, MADE_BY: run.options.made_by(devices, size)}
        provenance = {**config.model_settings(), **names, **how}
        rows = [each.fingerprint() for each in image_latents_rows(recipe, len(inputs.pictures))]
        artifacts.save_tensors(path, tensors, recipe, provenance, rows)
        run.settings_written(config)
    run.finish(
        path,
        shapes={name: list(tensor.shape) for name, tensor in tensors.items()},
        dtype=dtype,
        dtype_asked=config.vae_dtype,
        versions=recipe.versions,
        profile=profile,
        **devices,
    )


if __name__ == "__main__":
    run_script(ENCODE_PICTURES, main)
