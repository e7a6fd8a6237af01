"""diffusers' own cutting of large pictures into overlapping tiles."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch


class Tiles:
    """diffusers' own cutting into overlapping tiles and blending, around a decoder of tiles."""

    def __init__(self, vae: Any) -> None:
        """`vae` gives up its modules; another one has to hold the code of the decoder."""
        self.vae = vae
        self.vae.post_quant_conv = torch.nn.Identity()

    @property
    def size(self) -> int:
        """The most rows and columns of latents in a tile."""
        return int(self.vae.tile_latent_min_size)

    def rows(self, height: int) -> list[int]:
        """The rows of every tile of latents with so many rows, from above to below."""
        step = int(self.size * (1 - self.vae.tile_overlap_factor))
        return [min(self.size, height - first) for first in range(0, height, step)]

    def decode(self, scaled: np.ndarray, decode: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """[B, C, h, w] to [B, 3, H, W], by a function that decodes a tile of that form."""
        self.vae.decoder = _AsModule(decode)
        images = self.vae.tiled_decode(torch.from_numpy(scaled), return_dict=False)[0]
        return np.asarray(images.numpy())


class _AsModule(torch.nn.Module):
    """A function of numpy arrays where diffusers wants a module."""

    def __init__(self, function: Callable[[np.ndarray], np.ndarray]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.function(x.numpy()).copy())
