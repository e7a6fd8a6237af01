"""Decoding latents to 8-bit pictures, whole or in tiles."""

from typing import Any

import numpy as np

from common.vae.latent_scale import unscale_latents
from common.vae.runner import VaeRunner, to_pixels
from common.vae.tiles import Tiles


class Decoder:
    """One run's decoding by the VAE of a backend."""

    def __init__(self, runner: VaeRunner, tiles: Tiles | None) -> None:
        """`tiles` None decodes all pictures whole; else those that are no larger than a tile."""
        self.runner = runner
        self.tiles = tiles

    def decode(self, latents: np.ndarray, *, warm_up: bool = False) -> tuple[np.ndarray, bool]:
        """Latents [B, C, h, w] float32 to [B, H, W, 3] uint8, and whether all was finite.

        Args:
            warm_up: run each program once before it is timed, when it is compiled.
        """
        unscaled = unscale_latents(latents, self.runner.config)
        return self.decode_unscaled(unscaled, warm_up=warm_up)

    def decode_unscaled(
        self, latents: np.ndarray, *, warm_up: bool = False
    ) -> tuple[np.ndarray, bool]:
        """The same of latents as the VAE takes them."""
        if self._cuts(latents):
            return to_pixels(self._in_tiles(latents, warm_up=warm_up))
        pixels, finite = self.runner.compute("decode_whole", latents, warm_up=warm_up)
        return pixels, bool(finite)

    def decode_to_floats(self, latents: np.ndarray) -> np.ndarray:
        """Latents as the VAE takes them to [B, 3, H, W] float32, of which [-1, 1] is shown."""
        if self._cuts(latents):
            return self._in_tiles(latents)
        # The program of a tile stops before pixels are made.
        return np.asarray(self.runner.compute("decode_tile", latents))

    def _cuts(self, latents: np.ndarray) -> bool:
        return self.tiles is not None and self.tiles.cuts(latents.shape)

    def _in_tiles(self, latents: np.ndarray, *, warm_up: bool = False) -> np.ndarray:
        def decode_tile(tile: np.ndarray) -> Any:
            return self.runner.compute("decode_tile", tile, warm_up=warm_up)

        assert self.tiles is not None
        with self.runner.report.part("blending"):
            return self.tiles.decode(latents, decode_tile)
