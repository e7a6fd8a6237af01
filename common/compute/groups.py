"""The groups in which a run's images are computed."""

from collections.abc import Iterator

import numpy as np


def group_size(images: int, data_devices: int) -> int:
    """Images computed at once where so many are to be: a multiple of the `data` axis."""
    return max(1, -(-images // data_devices)) * data_devices


def groups(images: int, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Indices of the images in each group, and how many are real.

    The last group repeats its last image to keep the shape, which would otherwise recompile.
    """
    for start in range(0, images, size):
        real = min(size, images - start)
        yield np.minimum(np.arange(start, start + size), images - 1), real
