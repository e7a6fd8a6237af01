"""What is drawn for a group of images, and the state before its first step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from common.sampling.sampler import Sampler
from common.sampling.scheduler_tables import SchedulerTables


@dataclass(frozen=True, kw_only=True)
class NoiseBatch:
    """What is drawn for a batch of B images, float32, by one generator per image."""

    initial_latents: np.ndarray  # [B, C, h, w], scaled by the scheduler's initial_noise_scale
    noises: np.ndarray  # [S, B, C, h, w]; zeros after the K that the scheduler draws


def prepare_noise(
    seeds: Sequence[int],
    sampler: Sampler,
    tables: SchedulerTables,
    latent_shape: tuple[int, int, int],
    given: torch.Tensor | None = None,
) -> NoiseBatch:
    """Draw the initial latents and the scheduler's noises as diffusers does.

    Each image has a `torch.Generator` of its own on the CPU: first it draws the initial latents, or
    the noise on those that are given, then the scheduler itself, stepped on zeros, draws its noises
    from it.

    Args:
        given: latents to begin with, [B, C, h, w] float32.
    """
    size = len(tables.timesteps)
    initial = np.empty((len(seeds), *latent_shape), np.float32)
    noises = np.zeros((size, len(seeds), *latent_shape), np.float32)
    for index, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        own = None if given is None else given[index : index + 1]
        initial[index] = first_latents(sampler, generator, latent_shape, own)[0].numpy()
        if tables.noises:
            noises[: tables.noises, index] = draw_noises(sampler, seed, generator, latent_shape)
    return NoiseBatch(initial_latents=initial, noises=noises)


def first_latents(
    sampler: Sampler,
    generator: torch.Generator,
    latent_shape: tuple[int, int, int],
    given: torch.Tensor | None,
) -> torch.Tensor:
    """One image's latents before the first step, [1, C, h, w] float32.

    Noise, or latents that are given with noise on them or, of a run that was cut, as they are.
    Noise is the first that an image's generator draws; the sampler is to be restarted after that.
    """
    if given is not None and not sampler.step_range.adds_noise:
        return given
    noise = torch.randn((1, *latent_shape), generator=generator)
    if given is not None:
        return sampler.add_noise(given, noise)
    return noise * sampler.initial_noise_scale


def draw_noises(
    sampler: Sampler, seed: int, generator: torch.Generator, latent_shape: tuple[int, int, int]
) -> np.ndarray:
    """Let a scheduler draw all its noises for one image. Returns [K, C, h, w] float32."""
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


def prepare_state(noise: NoiseBatch) -> tuple[np.ndarray, np.ndarray]:
    """Latents [B, C, h, w] and history [1 + S, B, C, h, w] before the first step.

    The history holds the initial latents and the model's outputs so far.
    """
    history = np.zeros((1 + len(noise.noises), *noise.initial_latents.shape), np.float32)
    history[0] = noise.initial_latents
    return noise.initial_latents, history
