"""Decoding a run's latents: in groups of one shape, and the trajectory beside them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np

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


@dataclass(frozen=True)
class Latents:
    """The latents of a run's images, read when they are decoded."""

    read: Callable[[Sequence[int]], np.ndarray]  # those of some of one size, [N, C, h, w] float32
    sizes: list[list[int]]  # all images, those of one size together

    @classmethod
    def of(cls, artifact: Artifact) -> Self:
        """Those of a file; what cannot be verified of it is said."""
        rows = RowReader(artifact, warn)
        return cls(lambda images: rows.read(images)["latents"].float().numpy(), rows.sizes)

    @classmethod
    def in_memory(cls, latents: np.ndarray) -> Self:
        """The same of latents [B, C, h, w] float32 that are there."""
        return cls(lambda images: latents[images], [[*range(len(latents))]])


class Group(NamedTuple):
    """Images that are decoded at once."""

    own: list[int]
    size: int  # as many are computed, the last one again where these are fewer

    @property
    def computed(self) -> list[int]:
        """Those that are computed."""
        return self.own + [self.own[-1]] * (self.size - len(self.own))


def groups_of(images: Sequence[int], size: int) -> list[Group]:
    """Images of one size in groups."""
    firsts = range(0, len(images), size)
    return [Group([*images[first : first + size]], size) for first in firsts]


def grouped(
    decoder: "Decoder", latents: Latents, todo: Iterable[int], options: RunOptions
) -> list[Group]:
    """Images of a run in groups, those of one size one after the other."""
    chosen, found = {*todo}, list[Group]()
    for own in latents.sizes:
        size = decoder.runner.group_size(len(own), options)
        found += groups_of([image for image in own if image in chosen], size)
    return found


def decode_groups(
    decoder: "Decoder",
    latents: Latents,
    groups: Sequence[Group],
    options: RunOptions,
    *,
    bar: bool = True,
) -> Iterator[tuple[Group, np.ndarray]]:
    """Decode images group by group. Yields each, and its pictures [N, H, W, 3] uint8.

    Raises:
        NotFiniteError: the VAE gave infinities or not-a-numbers.
    """
    images = sum(len(group.own) for group in groups)
    with progress_bar(images, "decode", "image", hidden=not bar) as shown:
        for group in groups:
            read = latents.read(group.computed)
            pixels, finite = decoder.decode(read, warm_up=options.warmup)
            decoder.runner.refuse_infinities(finite, "picture was")
            yield group, pixels[: len(group.own)]
            shown.update(len(group.own))


def decode_all(
    decoder: "Decoder", latents: np.ndarray, options: RunOptions, *, bar: bool = True
) -> np.ndarray:
    """Decode latents [B, C, h, w] float32. Returns [B, H, W, 3] uint8."""
    read = Latents.in_memory(latents)
    groups = grouped(decoder, read, range(len(latents)), options)
    decoded = decode_groups(decoder, read, groups, options, bar=bar)
    return np.concatenate([pixels for _, pixels in decoded])


def measure(
    decoder: "Decoder", latents: Latents, options: RunOptions, profile_folder: Path
) -> "Profile | None":
    """Decode the first group again, as often as `--repeat` and `--profile` ask for."""
    group = grouped(decoder, latents, latents.sizes[0], options)[0]
    first = latents.read(group.computed)
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
