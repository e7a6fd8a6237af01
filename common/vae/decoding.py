"""Decoding a run's latents: in groups of one shape, and the trajectory beside them."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from common.compute.groups import groups
from common.compute.options import RunOptions
from common.files.artifacts import Artifact
from common.files.row_reader import RowReader
from common.messages import warn
from common.progress import progress_bar
from common.vae.grids import make_grid, shrink

if TYPE_CHECKING:
    from common.files.report import Profile
    from common.vae.decoder import Decoder

MOST_STRIP_PIXELS, MOST_FRAME_PIXELS = 192, 512  # a side of a picture of a trajectory


class Latents:
    """The latents of a run's images, read when they are decoded."""

    def __init__(self, rows: RowReader) -> None:
        self._rows, self.by_size, self.sizes = rows, rows.by_size, rows.sizes

    @classmethod
    def of(cls, artifact: Artifact) -> Self:
        """Those of a file; what cannot be verified of it is said."""
        return cls(RowReader(artifact, warn))

    def read(self, images: Sequence[int]) -> np.ndarray:
        """Those of some images of one size, [N, C, h, w] float32."""
        return self._rows.read(images)["latents"].float().numpy()


class LatentsInMemory:
    """The same of latents [B, C, h, w] float32 that are there."""

    def __init__(self, latents: np.ndarray) -> None:
        self._latents, self.sizes = latents, self.by_size(range(len(latents)))

    def by_size(self, images: Iterable[int]) -> list[list[int]]:
        """All of some, which are of one size."""
        return [[*images]]

    def read(self, images: Sequence[int]) -> np.ndarray:
        """Those of some images, [N, C, h, w]."""
        return self._latents[images]


def decode_groups(
    decoder: "Decoder",
    latents: Latents | LatentsInMemory,
    todo: Sequence[int],
    size: int,
    options: RunOptions,
    *,
    bar: bool = True,
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Decode images in groups of one shape. Yields the images of each, and [N, H, W, 3] uint8.

    Those of one size are decoded one after the other.

    Args:
        todo: the images to decode, by their indices.
        size: how many are decoded at once.

    Raises:
        NotFiniteError: the VAE gave infinities or not-a-numbers.
    """
    with progress_bar(len(todo), "decode", "image", hidden=not bar) as shown:
        for of_a_size in latents.by_size(todo):
            images = np.array(of_a_size, int)
            for places, real in groups(len(images), size):
                chosen = images[places].tolist()
                pixels, finite = decoder.decode(latents.read(chosen), warm_up=options.warmup)
                decoder.runner.refuse_infinities(finite, "picture was")
                yield chosen[:real], pixels[:real]
                shown.update(real)


def decode_all(
    decoder: "Decoder", latents: np.ndarray, options: RunOptions, *, bar: bool = True
) -> np.ndarray:
    """Decode latents [B, C, h, w] float32. Returns [B, H, W, 3] uint8."""
    size = decoder.runner.group_size(len(latents), options)
    read = LatentsInMemory(latents)
    decoded = decode_groups(decoder, read, range(len(latents)), size, options, bar=bar)
    return np.concatenate([pixels for _, pixels in decoded])


def measure(
    decoder: "Decoder",
    latents: Latents | LatentsInMemory,
    options: RunOptions,
    profile_folder: Path,
) -> "Profile | None":
    """Decode the first group again, as often as `--repeat` and `--profile` ask for."""
    images = latents.sizes[0]
    places, _ = next(groups(len(images), decoder.group_size(options)))
    first = latents.read([images[place] for place in places])
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
            images = decode_all(decoder, latents, options, bar=False)
            columns.append(np.concatenate([shrink(image, MOST_STRIP_PIXELS) for image in images]))
            frames.append(make_grid([shrink(image, MOST_FRAME_PIXELS) for image in images]))
            shown.update()
    return np.concatenate(columns, axis=1), frames
