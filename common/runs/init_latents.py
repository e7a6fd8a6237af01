"""Latents of another run that a run begins with: found, whole, and fitting."""

from pathlib import Path

from common.errors import BadInputFileError, BadSettingError
from common.files import artifacts
from common.files.artifacts import Artifact
from common.files.contracts import latents_misfit
from common.files.row_places import layouts_by_ending
from common.files.stage_table import LATENTS_FILE
from common.models.checkpoint import Checkpoint
from common.runs.generation import GenerationConfig
from common.runs.inputs import enlarged_size, path_of_latents
from common.runs.jobs import latent_shape


def find_init_latents(
    config: GenerationConfig, checkpoint: Checkpoint, run_dir: Path, *, verify: bool
) -> Artifact | None:
    """The latents that a run begins with; None where that is noise.

    Args:
        run_dir: where the run's own latents go.
        verify: as `artifacts.inspect`.

    Raises:
        BadInputFileError: they are not there, damaged, or no latents of this VAE.
        BadSettingError: of another size or number than the run's, or the file that it writes.
    """
    if config.init_latents is None:
        return None
    path = path_of_latents(config.init_latents)
    if path.resolve() == (run_dir / LATENTS_FILE).resolve():
        raise BadSettingError(
            f"--init_latents {config.init_latents} is what this run writes: choose another "
            "--output_dir"
        )
    found = artifacts.inspect(path, verify=verify)
    if misfit := latents_misfit(found, checkpoint.config("vae")):
        raise BadInputFileError(f"--init_latents: {path} {misfit}: choose another file")
    if len(sizes := layouts_by_ending(found)) > 1:
        raise BadSettingError(
            f"--init_latents: {path} has latents of {len(sizes)} sizes: a run that begins with "
            "latents has one"
        )
    ((count, *shape),) = (layouts["latents"].shape for layouts in sizes.values())
    images, wanted = len(config.image_seeds()), latent_shape(config, checkpoint)
    channels, *cells = shape
    if (channels, *enlarged_size(cells, config.upscale)) != wanted:
        height, width = (size * checkpoint.vae_scale_factor for size in cells)
        raise BadSettingError(
            f"--init_latents: {path} is of pictures of {width}×{height}, the run's are "
            f"{config.width}×{config.height}: give --width {width} --height {height}, or --upscale"
        )
    if count not in (1, images):
        raise BadSettingError(
            f"--init_latents: {path} has latents of {count} images, the run makes {images}: give "
            "one for all, or as many"
        )
    return found
