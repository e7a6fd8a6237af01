"""How latents become pictures, and in which files these are kept."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from common.declared import (
    FILES,
    IMAGE_LATENTS,
    MODEL,
    PICTURES,
    DeviceDtype,
    Settings,
    Text,
    setting,
)
from common.errors import BadSettingError
from common.files.picture_files import ImageFormat
from common.models.checkpoint import Checkpoint


class VaeSettings(Settings):
    """The VAE's dtype, tiles, and the pictures' format."""

    vae_dtype: DeviceDtype = setting(  # float32 where the VAE says `force_upcast`, else as the UNet
        "auto",
        "float32, bfloat16, auto.",
        metavar="DTYPE",
        group=MODEL,
        shapes=(IMAGE_LATENTS, PICTURES),
        recorded=False,
    )
    # Recipes hold whether anything is cut.
    tile: bool = setting(
        False,
        "Large pictures in tiles.",
        metavar=" ",
        group=MODEL,
        shapes=(IMAGE_LATENTS, PICTURES),
        recorded=False,
        shown="",
    )
    image_format: ImageFormat = setting(
        "png", "png, webp, jpg.", metavar="FORMAT", group=FILES, shapes=(PICTURES,)
    )
    name_template: Text | None = setting(  # None: by id, else by number
        None,
        "Names: {index:04d}_{seed}.",
        metavar="TEXT",
        group=FILES,
        shapes=(PICTURES,),
        recorded=False,
        shown="",
    )
    index: Literal["csv", "parquet"] | None = setting(  # beside images.jsonl
        None,
        "The list too: csv, parquet.",
        metavar="FORMAT",
        group=FILES,
        shapes=(PICTURES,),
        recorded=False,
        shown="",
    )
    # Of a run of several; more of them have several grids. Recipes of grids alone hold it.
    grid_images: int = setting(
        100,
        "Pictures of a grid; 0: no grid.",
        metavar="N",
        group=FILES,
        shapes=(PICTURES,),
        recorded=False,
        ge=0,
    )


def has_posterior(config: Mapping[str, Any]) -> bool:
    """Whether a VAE gives a distribution of latents, by its config; an `AutoencoderTiny` does not.

    That gives latents.
    """
    return config.get("_class_name") != "AutoencoderTiny"


def in_tiles(tile: bool, checkpoint: Checkpoint, shape: Sequence[int]) -> bool:
    """Whether latents [B, C, h, w] are cut: they are to be, and are larger than diffusers' tile."""
    config = checkpoint.config("vae")
    if tile and not has_posterior(config):
        raise BadSettingError(
            f"--tile: {checkpoint.source('vae').said} is an AutoencoderTiny, which takes whole "
            "pictures in little memory: leave the flag out"
        )
    sample_size = config.get("sample_size", 32)
    if isinstance(sample_size, list):
        sample_size = sample_size[0]
    return tile and max(shape[2:]) > sample_size // checkpoint.vae_scale_factor
