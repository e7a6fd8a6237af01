"""Decoding latents to 8-bit pictures, whole or in tiles."""

from typing import Any

import numpy as np

from common.compute.options import RunOptions
from common.vae.latent_scale import unscale_latents
from common.vae.runner import VaeRunner, to_pixels
from common.vae.tiles import Tiles


class Decoder:
    """One run's decoding by the VAE of a backend."""

    def __init__(self, runner: VaeRunner, tiles: Tiles | None, images: int) -> None:
        """
        Args:
            tiles: None decodes all pictures whole; else those that are no larger than a tile.
            images: of the run that have one size, at most.
        """
        self.runner, self.tiles, self._images = runner, tiles, images

    def group_size(self, options: RunOptions) -> int:
        """How many of the run's images are decoded at once, whatever their size."""
        return self.runner.group_size(self._images, options)

    def decode(self, latents: np.ndarray, *, warm_up: bool = False) -> tuple[np.ndarray, bool]:
        """Latents [B, C, h, w] float32 to [B, H, W, 3] uint8, and whether all was finite.

        Args:
            warm_up: run each program once before it is timed, when it is compiled.
        """
        scaled, runner = unscale_latents(latents, self.runner.config), self.runner
        if self.tiles is None or max(latents.shape[2:]) <= self.tiles.size:
            pixels, finite = runner.compute("decode_whole", scaled, warm_up=warm_up)
            return pixels, bool(finite)

        def decode_tile(tile: np.ndarray) -> Any:
            return runner.compute("decode_tile", tile, warm_up=warm_up)

        with runner.report.part("blending"):
            return to_pixels(self.tiles.decode(scaled, decode_tile))
