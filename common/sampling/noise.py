"""What is drawn for a group of images, and the state before its first step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from common.sampling.beginning import Beginning, First, Image
from common.sampling.sampler import Sampler
from common.sampling.scheduler_tables import SchedulerTables


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What each image's generator drew before the first step, and the generators, to go on."""

    first: First  # [B, C, h, w]
    generators: list[torch.Generator]  # on the CPU, one for each image


def draw_first(
    begin: Beginning,
    chosen: Sequence[int],
    seeds: Sequence[int],
    sampler: Sampler,
    shape: tuple[int, int, int],
) -> Drawn:
    """Let each image's own generator draw what the image begins with.

    Args:
        chosen: the images, by their indices.
        seeds: theirs.
        shape: of one image's latents, [C, h, w].
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    sampler.restart()
    each = [
        begin.draw(Image(index=index, generator=generator, sampler=sampler, shape=shape))
        for index, generator in zip(chosen, generators, strict=True)
    ]
    return Drawn(first=First.of(each), generators=generators)


def draw_all_noises(
    drawn: Drawn, seeds: Sequence[int], sampler: Sampler, tables: SchedulerTables
) -> np.ndarray:
    """Let the scheduler draw its noises for each image, as diffusers does.

    Returns:
        [S, B, C, h, w] float32; zeros after the K that the scheduler draws.
    """
    shape = drawn.first.latents.shape
    noises = np.zeros((len(tables.timesteps), *shape), np.float32)
    if tables.noises:
        for index, (seed, generator) in enumerate(zip(seeds, drawn.generators, strict=True)):
            own = draw_noises(sampler, seed, generator, tuple(shape[1:]))
            noises[: tables.noises, index] = own
    return noises


def draw_noises(
    sampler: Sampler, seed: int, generator: torch.Generator, latent_shape: tuple[int, ...]
) -> np.ndarray:
    """Let a scheduler, stepped on zeros, draw its noises for one image: [K, C, h, w] float32."""
    drawn: list[np.ndarray] = []

    def keep(_: tuple[int, ...], draw: Callable[[], torch.Tensor]) -> torch.Tensor:
        noise = draw()
        drawn.append(noise[0].numpy())
        return noise

    zeros = torch.zeros(1, *latent_shape)
    timesteps = sampler.restart([seed])
    with sampler.intercepted_noises(keep):
        for timestep in timesteps:
            sampler.scale_model_input(zeros, timestep)
            sampler.step(zeros, timestep, zeros, [generator])
    return np.stack(drawn)


def prepare_state(latents: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Latents [B, C, h, w] and history [R, B, C, h, w] before the first step.

    The history holds the first latents, the model's outputs so far, and the differences that soft
    masks made.

    Args:
        size: R, `SchedulerTables.history`.
    """
    history = np.zeros((size, *latents.shape), np.float32)
    history[0] = latents
    return latents, history


@dataclass(frozen=True, kw_only=True)
class KeptArea:
    """What stays of pictures that are inpainted, and is laid over the latents after every step."""

    masks: np.ndarray  # [B, 1, h, w]: 1 is made anew, 0 stays; between them for some steps
    original: np.ndarray  # [B, C, h, w], without noise
    noise: np.ndarray  # [B, C, h, w]

    @classmethod
    def of(cls, masks: torch.Tensor | None, first: First) -> "KeptArea":
        """That of images that have drawn; nothing stays of them without masks."""
        if masks is None or first.original is None or first.noise is None:
            zeros = np.zeros(first.latents.shape, np.float32)
            return cls(masks=np.ones_like(zeros[:, :1]), original=zeros, noise=zeros)
        return cls(masks=masks.numpy(), original=first.original.numpy(), noise=first.noise.numpy())

    def arrays(self) -> dict[str, np.ndarray]:
        """By their names."""
        return {"masks": self.masks, "original": self.original, "noise": self.noise}
