"""What is drawn for an image is what diffusers draws for it, whatever is drawn beside it."""

import numpy as np
import pytest
import torch

from common.sampling.noise import NoiseBatch, prepare_noise, prepare_state
from common.sampling.sampler import Sampler
from common.sampling.scheduler_tables import SchedulerTables, make_tables
from tests.sampling.tiny_unet import SHAPE, make_job

SEEDS = [7, 2**63 - 1, 0]


def draw(scheduler: str, seeds: list[int], steps: int = 4) -> tuple[NoiseBatch, SchedulerTables]:
    sampler: Sampler = make_job(scheduler=scheduler, steps=steps).sampler
    tables = make_tables(sampler)
    return prepare_noise(seeds, sampler, tables, SHAPE), tables


@pytest.mark.parametrize("scheduler", ["euler", "ddim", "euler_a"])
def test_latents_are_the_first_that_an_images_generator_draws(scheduler: str) -> None:
    found, tables = draw(scheduler, SEEDS)
    assert (tables.initial_noise_scale == 1) == (scheduler == "ddim")
    for image, seed in zip(found.initial_latents, SEEDS, strict=True):
        generator = torch.Generator().manual_seed(seed)
        expected = torch.randn(1, *SHAPE, generator=generator)[0] * tables.initial_noise_scale
        np.testing.assert_array_equal(image, expected.numpy())


def test_a_schedulers_noises_are_the_next_that_it_draws() -> None:
    found, tables = draw("euler_a", SEEDS)
    assert tables.noises == 4 and len(found.noises) == len(tables.timesteps) > 4
    for index, seed in enumerate(SEEDS):
        generator = torch.Generator().manual_seed(seed)
        torch.randn(1, *SHAPE, generator=generator)
        for k in range(tables.noises):
            expected = torch.randn(1, *SHAPE, generator=generator)[0].numpy()
            np.testing.assert_array_equal(found.noises[k, index], expected)
    assert not found.noises[tables.noises :].any()


@pytest.mark.parametrize("scheduler", ["euler_a", "lcm", "dpmpp_sde", "euler"])
def test_an_image_alone_has_the_noises_that_it_has_beside_others(scheduler: str) -> None:
    together, tables = draw(scheduler, SEEDS)
    assert bool(tables.noises) == together.noises.any() == (scheduler != "euler")
    for index, seed in enumerate(SEEDS):
        alone, _ = draw(scheduler, [seed])
        np.testing.assert_array_equal(alone.initial_latents[0], together.initial_latents[index])
        np.testing.assert_array_equal(alone.noises[:, 0], together.noises[:, index])


def test_before_the_first_step_the_history_holds_the_latents_alone() -> None:
    found, tables = draw("euler", SEEDS)
    latents, history = prepare_state(found)
    assert history.shape == (1 + len(tables.timesteps), len(SEEDS), *SHAPE)
    np.testing.assert_array_equal(latents, found.initial_latents)
    np.testing.assert_array_equal(history[0], latents)
    assert not history[1:].any()
