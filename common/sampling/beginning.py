"""What images begin with: noise, latents, or pictures that are drawn from a VAE's posterior.

Every image's generator draws in diffusers' order: the picture's sample, the noise, the masked
picture's sample; then the scheduler draws its own noises.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from common.sampling.sampler import Sampler
from common.vae.latent_scale import scale_latents
from common.vae.vae_settings import has_posterior


@dataclass(frozen=True, kw_only=True)
class First:
    """Images before their first step, each [B, C, h, w] float32."""

    latents: torch.Tensor
    original: torch.Tensor | None = None  # of a picture, without noise
    noise: torch.Tensor | None = None  # that lies on it
    masked: torch.Tensor | None = None  # of the picture without what is masked
    edited: torch.Tensor | None = None  # of a picture that is edited by instruction

    @classmethod
    def of(cls, each: "Sequence[First]") -> "First":
        """Several as one."""
        tensors: dict[str, Any] = {}
        for name in cls.__annotations__:
            found = [getattr(first, name) for first in each]
            tensors[name] = None if found[0] is None else torch.cat(found)
        return cls(**tensors)


@dataclass(frozen=True, kw_only=True)
class Image:
    """An image of a run, as far as it draws what it begins with."""

    index: int
    generator: torch.Generator  # its own, which draws here first
    sampler: Sampler  # restarted, and to be restarted after it has drawn
    shape: tuple[int, int, int]  # of its latents, [C, h, w]

    def noise(self) -> torch.Tensor:
        """What its generator draws next, [1, C, h, w]."""
        return torch.randn((1, *self.shape), generator=self.generator)


class Beginning(ABC):
    """What the images of a run begin with."""

    masks: torch.Tensor | None = None  # [B, 1, h, w] float32: 1 is made anew, 0 stays
    soft_masks = False  # whether what is between them stays for some of the steps

    @abstractmethod
    def draw(self, image: Image) -> First:
        """An image before its first step."""


class FromNoise(Beginning):
    """Images of a text alone."""

    def draw(self, image: Image) -> First:
        return First(latents=image.noise() * image.sampler.initial_noise_scale)


class FromLatents(Beginning):
    """Images that begin with latents: noised, or those of a run that was cut, as they are."""

    def __init__(self, latents: torch.Tensor) -> None:
        """`latents` are [B, C, h, w] float32."""
        self.latents = latents

    def draw(self, image: Image) -> First:
        given = self.latents[image.index : image.index + 1]
        if not image.sampler.step_range.adds_noise:
            return First(latents=given)
        return First(latents=image.sampler.add_noise(given, image.noise()))


class FromPictures(Beginning):
    """Images that begin with pictures, one or several of each."""

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        rows: Sequence[int],
        vae: Mapping[str, Any],
    ) -> None:
        """
        Args:
            tensors: stage 0's.
            rows: of the tensors, each image's own [B].
            vae: the VAE's config.
        """
        self.tensors, self.rows, self.vae = tensors, rows, vae
        # A VAE that gives latents alone draws nothing.
        self.draws = has_posterior(vae)

    def draw(self, image: Image) -> First:
        original = self._sample("image_latents", image)
        noise = image.noise()
        return First(
            latents=image.sampler.add_noise(original, noise), original=original, noise=noise
        )

    def _sample(self, name: str, image: Image) -> torch.Tensor:
        """A sample of a posterior, as the UNet takes it, [1, C, h, w]."""
        row = slice(self.rows[image.index], self.rows[image.index] + 1)
        sample = self.tensors[f"{name}_mean"][row].float()
        if self.draws:
            sample = sample + self.tensors[f"{name}_std"][row].float() * image.noise()
        return torch.from_numpy(scale_latents(np.asarray(sample.numpy()), self.vae))


class FromMaskedPictures(FromPictures):
    """Pictures of which a part is made anew."""

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        rows: Sequence[int],
        vae: Mapping[str, Any],
        *,
        by_channels: bool,
        soft: bool = False,
    ) -> None:
        """
        Args:
            by_channels: the UNet is shown the mask and the masked picture; else what stays is laid
                over the latents after every step.
            soft: it is laid over them for as many steps as its mask is dark.
        """
        super().__init__(tensors, rows, vae)
        self.by_channels, self.soft_masks = by_channels, soft
        self.masks = tensors["latent_masks"].float()[list(rows)]

    def draw(self, image: Image) -> First:
        # As in diffusers: such an image begins with noise alone. With soft masks it never does.
        from_noise = image.sampler.step_range.strength == 1.0 and not self.soft_masks
        original = None
        if not (from_noise and self.by_channels):
            original = self._sample("image_latents", image)
        noise = image.noise()
        if from_noise or original is None:
            latents = noise * image.sampler.initial_noise_scale
        else:
            latents = image.sampler.add_noise(original, noise)
        # Drawn for four channels as well, which are not shown it.
        masked = self._sample("masked_image_latents", image)
        return First(latents=latents, original=original, noise=noise, masked=masked)


class FromEditedPictures(FromNoise):
    """Noise beside pictures that are edited by instruction."""

    def __init__(self, means: torch.Tensor, rows: Sequence[int], scale: float) -> None:
        """
        Args:
            means: of stage 0's posteriors [I, C, h, w]: diffusers takes the mode.
            rows: of them, each image's own [B].
            scale: of the latents, which InstructPix2Pix has as the VAE gives them.
        """
        self.means, self.rows, self.scale = means, rows, scale

    def draw(self, image: Image) -> First:
        first, row = super().draw(image), self.rows[image.index]
        return replace(first, edited=self.means[row : row + 1].float() * self.scale)
