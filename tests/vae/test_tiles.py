"""Tiles are cut and blended by diffusers' own code, around a decoder of ours."""

from typing import Any

import numpy as np
import pytest
import torch

from common.models.checkpoint import Checkpoint
from common.models.weights import make_without_weights
from common.vae.tiles import Tiles
from tests.vae.tiny_vae import TILE, load_by_diffusers, random_latents


def tiles_of(checkpoint: Checkpoint) -> Tiles:
    return Tiles(make_without_weights(checkpoint, "vae", torch.float32))


@pytest.mark.parametrize("size", [(TILE + 1, 4), (20, 13), (2 * TILE, 3 * TILE)])
@torch.no_grad()
def test_pictures_are_those_of_diffusers_tiling(
    checkpoint: Checkpoint, size: tuple[int, int]
) -> None:
    vae: Any = load_by_diffusers(checkpoint)
    vae.enable_tiling()
    scaled = random_latents(2, 4, *size)
    expected = vae.decode(torch.from_numpy(scaled)).sample.numpy()
    whole = load_by_diffusers(checkpoint)
    heights = []

    def decode(tile: np.ndarray) -> np.ndarray:
        heights.append(tile.shape[2])
        return whole.decode(torch.from_numpy(tile)).sample.numpy()  # type: ignore[no-any-return]

    tiles = tiles_of(checkpoint)
    np.testing.assert_array_equal(tiles.decode(scaled, decode), expected)
    assert sorted(set(heights)) == sorted(set(tiles.rows(size[0])))


@pytest.mark.parametrize("size", [(2 * TILE + 2, 8), (40, 26)])
@torch.no_grad()
def test_moments_are_those_of_diffusers_tiling(
    checkpoint: Checkpoint, size: tuple[int, int]
) -> None:
    pictures = random_latents(2, 3, *size)
    vae, whole = load_by_diffusers(checkpoint), load_by_diffusers(checkpoint)
    vae.enable_tiling()
    expected = vae.encode(torch.from_numpy(pictures)).latent_dist.parameters.numpy()
    heights = []

    def encode(tile: np.ndarray) -> np.ndarray:
        heights.append(tile.shape[2])
        found: np.ndarray = whole.encode(torch.from_numpy(tile)).latent_dist.parameters.numpy()
        return found

    tiles = tiles_of(checkpoint)
    np.testing.assert_array_equal(tiles.encode(pictures, encode), expected)
    assert sorted(set(heights)) == sorted(set(tiles.sample_rows(size[0])))


def test_the_rows_of_tiles(checkpoint: Checkpoint) -> None:
    """A quarter of each overlaps the next."""
    tiles = tiles_of(checkpoint)
    assert tiles.size == TILE
    assert tiles.rows(TILE) == [8, 2]
    assert tiles.rows(20) == [8, 8, 8, 2]
    assert tiles.sample_size == 2 * TILE and tiles.sample_rows(24) == [16, 12]
