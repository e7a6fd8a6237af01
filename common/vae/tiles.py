"""diffusers' own cutting of large pictures into overlapping tiles."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

ComputeTile = Callable[[np.ndarray], np.ndarray]


class Tiles:
    """diffusers' own cutting into overlapping tiles and blending, around what computes tiles."""

    def __init__(self, vae: Any) -> None:
        """`vae` gives up its modules; another one has to hold the code of its halves."""
        self.vae = vae
        self.vae.post_quant_conv = torch.nn.Identity()
        self.vae.quant_conv = torch.nn.Identity()

    @property
    def size(self) -> int:
        """The most rows and columns of latents in a tile."""
        return int(self.vae.tile_latent_min_size)

    @property
    def sample_size(self) -> int:
        """The same in pixels."""
        return int(self.vae.tile_sample_min_size)

    def cuts(self, shape: Sequence[int]) -> bool:
        """Whether latents [B, C, h, w] are larger than a tile."""
        return max(shape[2:]) > self.size

    def rows(self, height: int) -> list[int]:
        """The rows of every tile of latents with so many rows, from above to below."""
        return self._cut(height, self.size)

    def sample_rows(self, height: int) -> list[int]:
        """The same of a picture, in pixels."""
        return self._cut(height, self.sample_size)

    def _cut(self, height: int, size: int) -> list[int]:
        step = int(size * (1 - self.vae.tile_overlap_factor))
        return [min(size, height - first) for first in range(0, height, step)]

    def decode(self, scaled: np.ndarray, decode: ComputeTile) -> np.ndarray:
        """[B, C, h, w] to [B, 3, H, W], by a function that decodes a tile of that form."""
        self.vae.decoder = _AsModule(decode)
        images = self.vae.tiled_decode(torch.from_numpy(scaled), return_dict=False)[0]
        return np.asarray(images.numpy())

    def encode(self, pictures: np.ndarray, encode: ComputeTile) -> np.ndarray:
        """[B, 3, H, W] to moments [B, 2C, h, w], by a function that encodes a tile of that form."""
        self.vae.encoder = _AsModule(encode)
        self.vae.enable_tiling()
        posterior = self.vae.encode(torch.from_numpy(pictures), return_dict=False)[0]
        return np.asarray(posterior.parameters.numpy())


class _AsModule(torch.nn.Module):
    """A function of numpy arrays where diffusers wants a module."""

    def __init__(self, function: ComputeTile) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.function(x.numpy()).copy())
