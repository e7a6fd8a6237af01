"""Several pictures laid out as one."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

MOST_GRID_PIXELS = 16_000  # a side; WebP ends at 16 383


def shrink(picture: np.ndarray, side: int) -> np.ndarray:
    """A picture [H, W, 3] uint8 with sides of at most `side` pixels."""
    image = Image.fromarray(picture)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return np.asarray(image)


def make_grid(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Lay [H, W, 3] pictures out row by row, as square as possible, the rest white.

    Those of several sizes stand amid cells of the largest. All are shrunk alike where the grid
    would be larger than the formats for pictures can hold.
    """
    columns = int(np.ceil(np.sqrt(len(pictures))))
    largest = max(max(each.shape[:2]) for each in pictures)
    if columns > 1 and columns * largest > MOST_GRID_PIXELS:
        side = MOST_GRID_PIXELS // columns
        sides = [max(1, max(each.shape[:2]) * side // largest) for each in pictures]
        pictures = [shrink(each, own) for each, own in zip(pictures, sides, strict=True)]
    height, width = (max(each.shape[axis] for each in pictures) for axis in (0, 1))
    rows = int(np.ceil(len(pictures) / columns))
    grid = np.full((rows, height, columns, width, 3), 255, np.uint8)
    for number, each in enumerate(pictures):
        above, left = (height - each.shape[0]) // 2, (width - each.shape[1]) // 2
        cell = grid[number // columns, :, number % columns]
        cell[above : above + each.shape[0], left : left + each.shape[1]] = each
    return grid.reshape(rows * height, columns * width, 3)
