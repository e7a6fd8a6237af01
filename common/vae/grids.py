"""Several pictures laid out as one."""

import numpy as np
from PIL import Image

MOST_GRID_PIXELS = 16_000  # a side; WebP ends at 16 383


def shrink(picture: np.ndarray, side: int) -> np.ndarray:
    """A picture [H, W, 3] uint8 with sides of at most `side` pixels."""
    image = Image.fromarray(picture)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return np.asarray(image)


def make_grid(pictures: np.ndarray) -> np.ndarray:
    """Lay [B, H, W, 3] pictures out row by row, as square as possible, the rest white.

    They are shrunk where the grid would be larger than the formats for pictures can hold.
    """
    columns = int(np.ceil(np.sqrt(len(pictures))))
    if columns > 1 and columns * max(pictures.shape[1:3]) > MOST_GRID_PIXELS:
        pictures = np.stack([shrink(each, MOST_GRID_PIXELS // columns) for each in pictures])
    count, height, width, channels = pictures.shape
    rows = int(np.ceil(count / columns))
    grid = np.full((rows * columns, height, width, channels), 255, np.uint8)
    grid[:count] = pictures
    laid_out = grid.reshape(rows, columns, height, width, channels).transpose(0, 2, 1, 3, 4)
    return laid_out.reshape(rows * height, columns * width, channels)
