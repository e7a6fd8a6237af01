"""What is drawn for an image is what diffusers draws for it, whatever is drawn beside it."""

import numpy as np
import pytest
import torch

from common.sampling.beginning import First, FromNoise
from common.sampling.noise import KeptArea, draw_all_noises, draw_first, prepare_state
from common.sampling.sampler import Sampler
from common.sampling.scheduler_tables import SchedulerTables, make_tables
from tests.sampling.tiny_unet import SHAPE, make_job

SEEDS = [7, 2**63 - 1, 0]


def draw(
    scheduler: str, seeds: list[int], steps: int = 4
) -> tuple[np.ndarray, np.ndarray, SchedulerTables]:
    """The first latents [B, C, h, w], the scheduler's noises [S, B, C, h, w], its tables."""
    sampler: Sampler = make_job(scheduler=scheduler, steps=steps).sampler
    tables = make_tables(sampler)
    drawn = draw_first(FromNoise(), range(len(seeds)), seeds, sampler, SHAPE)
    return drawn.first.latents.numpy(), draw_all_noises(drawn, seeds, sampler, tables), tables


@pytest.mark.parametrize("scheduler", ["euler", "ddim", "euler_a"])
def test_latents_are_the_first_that_an_images_generator_draws(scheduler: str) -> None:
    found, _, tables = draw(scheduler, SEEDS)
    assert (tables.initial_noise_scale == 1) == (scheduler == "ddim")
    for image, seed in zip(found, SEEDS, strict=True):
        generator = torch.Generator().manual_seed(seed)
        expected = torch.randn(1, *SHAPE, generator=generator)[0] * tables.initial_noise_scale
        np.testing.assert_array_equal(image, expected.numpy())


def test_a_schedulers_noises_are_the_next_that_it_draws() -> None:
    _, found, tables = draw("euler_a", SEEDS)
    assert tables.noises == 4 and len(found) == len(tables.timesteps) > 4
    for index, seed in enumerate(SEEDS):
        generator = torch.Generator().manual_seed(seed)
        torch.randn(1, *SHAPE, generator=generator)
        for k in range(tables.noises):
            expected = torch.randn(1, *SHAPE, generator=generator)[0].numpy()
            np.testing.assert_array_equal(found[k, index], expected)
    assert not found[tables.noises :].any()


@pytest.mark.parametrize("scheduler", ["euler_a", "lcm", "dpmpp_sde", "euler"])
def test_an_image_alone_has_the_noises_that_it_has_beside_others(scheduler: str) -> None:
    latents, noises, tables = draw(scheduler, SEEDS)
    assert bool(tables.noises) == noises.any() == (scheduler != "euler")
    for index, seed in enumerate(SEEDS):
        own_latents, own_noises, _ = draw(scheduler, [seed])
        np.testing.assert_array_equal(own_latents[0], latents[index])
        np.testing.assert_array_equal(own_noises[:, 0], noises[:, index])


def test_before_the_first_step_the_history_holds_the_latents_alone() -> None:
    found, noises, tables = draw("euler", SEEDS)
    latents, history = prepare_state(found, tables.history)
    assert len(noises) == len(tables.timesteps)
    assert history.shape == (1 + len(tables.timesteps), len(SEEDS), *SHAPE)
    np.testing.assert_array_equal(latents, found)
    np.testing.assert_array_equal(history[0], latents)
    assert not history[1:].any()


def test_nothing_stays_without_masks() -> None:
    latents = torch.ones(2, *SHAPE)
    first = First(latents=latents, original=latents + 1, noise=latents + 2)
    for kept in (KeptArea.of(None, first), KeptArea.of(None, First(latents=latents))):
        assert kept.masks.shape == (2, 1, *SHAPE[1:]) and kept.masks.all()
        assert not kept.original.any() and kept.noise.shape == latents.shape
    masks = torch.zeros(2, 1, *SHAPE[1:])
    kept = KeptArea.of(masks, first)
    assert not kept.masks.any() and (kept.original == 2).all() and (kept.noise == 3).all()
