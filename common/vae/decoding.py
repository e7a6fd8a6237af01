"""Decoding all of a run's latents: in groups of one shape, and the trajectory beside them."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.compute.options import RunOptions
from common.files.kept_progress import Progress
from common.messages import progress_bar
from common.stopping import StopRequest
from common.vae.grids import make_grid, shrink

if TYPE_CHECKING:
    from common.files.report import Profile
    from common.vae.decoder import Decoder

MOST_STRIP_PIXELS, MOST_FRAME_PIXELS = 192, 512  # a side of a picture of a trajectory


def decode_groups(
    decoder: "Decoder",
    latents: np.ndarray,
    options: RunOptions,
    *,
    bar: bool = True,
    progress: Progress | None = None,
    stop: StopRequest | None = None,
) -> np.ndarray:
    """Decode latents [B, C, h, w] in groups of one shape. Returns [B, H, W, 3] uint8.

    Args:
        progress: where each group's pictures are kept until all are done, if there are several.
        stop: asked after each group.

    Raises:
        NotFiniteError: the VAE gave infinities or not-a-numbers.
        StoppedError: a stop was asked for; what is done is kept.
    """
    runner = decoder.runner

    def decode(chosen: np.ndarray) -> dict[str, np.ndarray]:
        pixels, finite = decoder.decode(chosen, warm_up=options.warmup)
        runner.refuse_infinities(finite, "picture was")
        return {"images": pixels}

    shown = progress_bar(len(latents), "decode", "image", hidden=not bar)
    found = runner.in_groups(
        latents, decode, options, bar=shown, units="images", progress=progress, stop=stop
    )
    return found["images"]


def measure(
    decoder: "Decoder", latents: np.ndarray, options: RunOptions, profile_folder: Path
) -> "Profile | None":
    """Decode the first group again, as often as `--repeat` and `--profile` ask for."""
    first = decoder.runner.first_group(latents, options)
    return decoder.runner.measure(lambda: decoder.decode(first), options, profile_folder)


def decode_trajectory(
    decoder: "Decoder", trajectory: np.ndarray, options: RunOptions
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Decode the latents [S, B, C, h, w] that stage 2 kept.

    Returns:
        A strip [H, W, 3] uint8 with a row for each image and a column for each step, and frames
        [H, W, 3] with all images as they are after one step.
    """
    columns, frames = [], []
    shown = progress_bar(len(trajectory), "trajectory", "step")
    with decoder.runner.counting_as("trajectory"), shown:
        for latents in trajectory:
            images = decode_groups(decoder, latents, options, bar=False)
            columns.append(np.concatenate([shrink(image, MOST_STRIP_PIXELS) for image in images]))
            frames.append(make_grid(np.stack([shrink(i, MOST_FRAME_PIXELS) for i in images])))
            shown.update()
    return np.concatenate(columns, axis=1), frames
