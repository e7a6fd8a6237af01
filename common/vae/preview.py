"""What latents will look like, without the VAE: colours that least squares fit to what it decodes.

A latent cell's colour is a polynomial of second degree of its channels. One of first degree is
enough for the VAEs of Stable Diffusion and too little for small ones. The fit is to pictures that
are drawn here, encoded and decoded again: random latents are none that a VAE decodes to pictures,
and the pictures of one run may all have one colour.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from common.vae.latent_scale import scale_latents, unscale_latents
from common.vae.runner import encode_moments, has_posterior

PICTURES = 32  # that are drawn
CELLS = 8  # of a side of their latents
MOST_SHAPES = 2  # on a picture's background
RIDGE = 1e-2  # of the mean squares, against channels that say the same


class PreviewFit:
    """The fit to one VAE, picture by picture: whoever has other things to do may do them between.

    One by one they also need less memory.
    """

    def __init__(self, vae: Any, factor: int) -> None:
        """
        Args:
            vae: diffusers' module, in float32 on the CPU, which can encode.
            factor: pixels of a cell's side.
        """
        self._vae, self._factor = vae, factor
        self._pictures = draw_pictures(PICTURES, CELLS * factor)
        self._squares: np.ndarray | float = 0.0
        self._products: np.ndarray | float = 0.0

    def advance(self) -> np.ndarray | None:
        """Take one picture more. Returns the weights [K, 3] after the last, else None."""
        picture = next(self._pictures, None)
        if picture is None:
            rows = PICTURES * CELLS**2
            squares, products = np.asarray(self._squares) / rows, np.asarray(self._products) / rows
            return np.linalg.solve(squares + RIDGE * np.eye(len(squares)), products)
        with _one_thread():
            latents, decoded = _there_and_back(self._vae, picture)
        cells = decoded.reshape(CELLS, self._factor, CELLS, self._factor, 3).mean((1, 3))
        known = _terms(latents)
        self._squares += known.T @ known
        self._products += known.T @ cells.reshape(-1, 3)
        return None


def preview_of(latents: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Latents [C, h, w], as the sampler has them, to colours [h, w, 3] uint8."""
    colours = (_terms(latents) @ weights).reshape(*latents.shape[1:], 3)
    return np.round(np.clip(np.nan_to_num(colours), 0, 1) * 255).astype(np.uint8)


def _terms(latents: np.ndarray) -> np.ndarray:
    """1, each channel, each product of two, of each cell [h·w, K]."""
    cells = latents.reshape(len(latents), -1)
    first, second = np.triu_indices(len(cells))
    return np.concatenate([np.ones_like(cells[:1]), cells, cells[first] * cells[second]]).T


def draw_pictures(number: int, side: int) -> Iterator[np.ndarray]:
    """Discs and squares on a ground, all of any colour, as [side, side, 3] float32 in [0, 1]."""
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[:side, :side] / side
    for _ in range(number):
        picture = np.broadcast_to(_colour(random), (side, side, 3)).astype(np.float32)
        for _ in range(random.integers(MOST_SHAPES + 1)):
            y, x, radius = random.random(), random.random(), random.uniform(0.15, 0.35)
            away = np.abs(rows - y), np.abs(columns - x)
            is_disc = random.random() < 0.5
            picture[(np.hypot(*away) if is_disc else np.maximum(*away)) < radius] = _colour(random)
        yield picture


def _colour(random: np.random.Generator) -> np.ndarray:
    """Any colour; each channel is often none or all of it."""
    return np.clip(random.random(3) * 1.5 - 0.25, 0, 1)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Within the block PyTorch computes by one thread, which waits for no other process's turn."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def _there_and_back(vae: Any, picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A picture's latents [C, h, w], as a sampler has them, and what they decode to [H, W, 3]."""
    moments = encode_moments(vae, torch.from_numpy(picture * 2 - 1).permute(2, 0, 1)[None])
    means = moments.chunk(2, 1)[0] if has_posterior(vae) else moments
    latents = scale_latents(means.numpy(), vae.config)
    unscaled = torch.from_numpy(unscale_latents(latents, vae.config))
    decoded = vae.decode(unscaled, return_dict=False)[0][0].permute(1, 2, 0).numpy()
    return latents[0], np.clip(decoded / 2 + 0.5, 0, 1)
