"""Encoding pictures to the VAE's posterior over latents, whole or in tiles."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from common.vae.runner import VaeRunner, has_posterior
from common.vae.tiles import Tiles


@dataclass(frozen=True, kw_only=True)
class Posterior:
    """A VAE's distribution over latents, as the VAE has them: nothing is scaled."""

    mean: np.ndarray  # [B, C, h, w] float32
    std: np.ndarray  # likewise; zeros of a VAE that gives latents alone


class Encoder:
    """One run's encoding by the VAE of a backend."""

    def __init__(self, runner: VaeRunner, tiles: Tiles | None) -> None:
        """`tiles` None encodes pictures whole."""
        self.runner = runner
        self.tiles = tiles

    def encode(self, pictures: np.ndarray, *, warm_up: bool = False) -> Posterior:
        """Pictures [B, 3, H, W] float32 in [-1, 1] to their posteriors.

        Args:
            warm_up: run each program once before it is timed, when it is compiled.
        """
        return self.posterior(self.encode_to_moments(pictures, warm_up=warm_up))

    def encode_to_moments(self, pictures: np.ndarray, *, warm_up: bool = False) -> np.ndarray:
        """The posterior's parameters [B, 2C, h, w]; of an `AutoencoderTiny` its latents."""
        runner = self.runner
        if self.tiles is None:
            return np.asarray(runner.compute("encode_whole", pictures, warm_up=warm_up))

        def encode_tile(tile: np.ndarray) -> Any:
            return runner.compute("encode_tile", tile, warm_up=warm_up)

        with runner.report.part("blending"):
            return self.tiles.encode(pictures, encode_tile)

    def posterior(self, moments: np.ndarray) -> Posterior:
        """That of these parameters, by diffusers' `DiagonalGaussianDistribution`."""
        if not has_posterior(self.runner.module):
            return Posterior(mean=moments, std=np.zeros_like(moments))
        import torch
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        found = DiagonalGaussianDistribution(torch.from_numpy(np.array(moments)))
        return Posterior(mean=found.mean.numpy(), std=found.std.numpy())
