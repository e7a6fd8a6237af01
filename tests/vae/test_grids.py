"""Grids hold every picture, as square as possible, and never more than a format can."""

import numpy as np
import pytest
from PIL import Image

from common.vae.grids import MOST_GRID_PIXELS, make_grid, shrink


@pytest.mark.parametrize(
    ("count", "rows", "columns"), [(1, 1, 1), (2, 1, 2), (3, 2, 2), (5, 2, 3), (9, 3, 3)]
)
def test_a_grid_as_pillow_pastes_it(count: int, rows: int, columns: int) -> None:
    height, width = 4, 6
    pictures = np.random.default_rng(count).integers(0, 255, (count, height, width, 3), np.uint8)
    expected = Image.new("RGB", (columns * width, rows * height), "white")
    for index, picture in enumerate(pictures):
        row, column = divmod(index, columns)
        expected.paste(Image.fromarray(picture), (column * width, row * height))
    np.testing.assert_array_equal(make_grid(pictures), np.asarray(expected))


def test_a_large_grid_is_shrunk() -> None:
    pictures = np.zeros((4, 30, MOST_GRID_PIXELS, 3), np.uint8)
    grid = make_grid(pictures)
    assert grid.shape[1] == MOST_GRID_PIXELS
    assert make_grid(pictures[:1]).shape == (30, MOST_GRID_PIXELS, 3)  # alone it stays


def test_a_picture_keeps_its_proportions() -> None:
    picture = np.zeros((100, 200, 3), np.uint8)
    assert shrink(picture, 50).shape == (25, 50, 3)
    assert shrink(picture, 300).shape == picture.shape  # it is not made larger


def test_the_grid_shows_every_picture_in_order() -> None:
    images = np.stack([np.full((2, 3, 3), value, np.uint8) for value in (10, 20, 30)])
    grid = make_grid(images)
    assert grid.shape == (4, 6, 3)
    assert (grid[:2, :3] == 10).all() and (grid[:2, 3:] == 20).all()
    assert (grid[2:, :3] == 30).all() and (grid[2:, 3:] == 255).all()
