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
        scaled, runner = unscale_latents(latents, self.runner.config), self.runner
        if self.tiles is None or not self.tiles.cuts(latents.shape):
            pixels, finite = runner.compute("decode_whole", scaled, warm_up=warm_up)
            return pixels, bool(finite)

        def decode_tile(tile: np.ndarray) -> Any:
            return runner.compute("decode_tile", tile, warm_up=warm_up)

        with runner.report.part("blending"):
            return to_pixels(self.tiles.decode(scaled, decode_tile))
