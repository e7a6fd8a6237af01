"""Decoding all of a run's latents: in groups of one shape, and the trajectory beside them."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.compute.groups import groups
from common.compute.options import RunOptions
from common.errors import NotFiniteError
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
    import torch

    runner = decoder.runner
    size = runner.group_size(len(latents), options)
    decoded = []
    with progress_bar(len(latents), "decode", "image", hidden=not bar) as shown:
        for number, (chosen, real) in enumerate(groups(len(latents), size)):
            finished = progress.read_group(number) if progress is not None else None
            if finished is not None:
                decoded.append(finished["images"].numpy())
                shown.update(real)
                continue
            pixels, finite = decoder.decode(latents[chosen], warm_up=options.warmup)
            if not finite:
                dtype = str(runner.dtype).removeprefix("torch.")
                raise NotFiniteError(
                    f"the VAE in {dtype} gave values that are not finite, so no picture "
                    "was written: use --vae_dtype float32"
                )
            decoded.append(pixels[:real])
            shown.update(real)
            if progress is not None and len(latents) > size:
                progress.save_group(number, {"images": torch.from_numpy(pixels[:real].copy())})
            if stop is not None and len(latents) > size:
                done = sum(map(len, decoded))
                stop.raise_if_asked(
                    f"after {done} of {len(latents)} images, which are kept: the same command goes "
                    "on from there"
                )
    return np.concatenate(decoded)


def measure(
    decoder: "Decoder", latents: np.ndarray, options: RunOptions, profile_folder: Path
) -> "Profile | None":
    """Decode the first group again, as often as `--repeat` and `--profile` ask for."""
    runner = decoder.runner
    size = runner.group_size(len(latents), options)
    first = latents[next(groups(len(latents), size))[0]]
    return runner.measure(lambda: decoder.decode(first), options, profile_folder)


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
