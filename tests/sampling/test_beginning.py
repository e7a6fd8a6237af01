"""Images draw what they begin with by their own seeds, in diffusers' order."""

from typing import Any

import numpy as np
import pytest
import torch

from common.sampling.beginning import (
    Beginning,
    First,
    FromEditedPictures,
    FromLatents,
    FromMaskedPictures,
    FromNoise,
    FromPictures,
    Image,
)
from common.sampling.sampler import Sampler, make_scheduler
from common.sampling.schedulers import SCHEDULERS
from common.sampling.step_range import StepRange
from tests.tiny_checkpoints import SCHEDULER

SHAPE, SEED = (4, 6, 6), 11
VAE = {"scaling_factor": 0.5}
random = torch.Generator().manual_seed(2)
TENSORS = {
    **{
        f"{name}_{kind}": torch.rand((2, *SHAPE), generator=random)
        for name in ("image_latents", "masked_image_latents")
        for kind in ("mean", "std")
    },
    "latent_masks": torch.randint(0, 2, (2, 1, *SHAPE[1:]), generator=random).float(),
}


def sampler_of(**cut: float) -> Sampler:
    row, settings = SCHEDULERS["euler"], SCHEDULER | {"timestep_spacing": "leading"}
    scheduler = make_scheduler(settings, row.class_name, row.options)
    return Sampler(scheduler, num_inference_steps=10, step_range=StepRange(**cut))


def draw(begin: Beginning, sampler: Sampler, index: int = 0) -> tuple[First, list[torch.Tensor]]:
    """What an image begins with, and the noises that its generator gives one after the other."""
    sampler.restart()
    own = torch.Generator().manual_seed(SEED)
    image = Image(index=index, generator=own, sampler=sampler, shape=SHAPE)
    first = begin.draw(image)
    generator = torch.Generator().manual_seed(SEED)
    return first, [torch.randn((1, *SHAPE), generator=generator) for _ in range(3)]


def sample(name: str, row: int, noise: torch.Tensor) -> torch.Tensor:
    own = slice(row, row + 1)
    return 0.5 * (TENSORS[f"{name}_mean"][own] + TENSORS[f"{name}_std"][own] * noise)


def test_noise_alone() -> None:
    sampler = sampler_of()
    sampler.restart()
    first, (noise, *_) = draw(FromNoise(), sampler)
    assert first.latents.equal(noise * sampler.initial_noise_scale)
    assert first.original is first.noise is first.masked is None


def test_latents_of_a_cut_run_get_no_noise() -> None:
    given = torch.rand((2, *SHAPE))
    first, _ = draw(FromLatents(given), sampler_of(denoising_start=0.5), 1)
    assert first.latents.equal(given[1:])
    sampler = sampler_of(strength=0.5)
    first, (noise, *_) = draw(FromLatents(given), sampler, 1)
    assert first.latents.equal(sampler.add_noise(given[1:], noise))


def test_a_picture_is_drawn_before_its_noise() -> None:
    sampler = sampler_of(strength=0.5)
    first, (of_picture, noise, _) = draw(FromPictures(TENSORS, [0, 1, 1], VAE), sampler, 2)
    expected = sample("image_latents", 1, of_picture)
    assert first.original is not None and torch.allclose(first.original, expected)
    assert torch.allclose(first.latents, sampler.add_noise(expected, noise))
    assert first.masked is None


def test_a_vae_that_gives_latents_alone_draws_nothing() -> None:
    sampler = sampler_of(strength=0.5)
    vae = VAE | {"_class_name": "AutoencoderTiny"}
    first, (noise, *_) = draw(FromPictures(TENSORS, [1], vae), sampler)
    assert first.original is not None and first.original.equal(
        TENSORS["image_latents_mean"][1:] / 2
    )
    assert first.noise is not None and first.noise.equal(noise)


@pytest.mark.parametrize("by_channels", [False, True])
@pytest.mark.parametrize("strength", [0.5, 0.9999, 1.0])
def test_a_masked_picture_is_drawn_last(by_channels: bool, strength: float) -> None:
    """Only nine channels at strength 1 leave the picture itself out."""
    sampler = sampler_of(strength=strength)
    begin = FromMaskedPictures(TENSORS, [1], VAE, by_channels=by_channels)
    first, noises = draw(begin, sampler)
    skips = by_channels and strength == 1.0
    of_picture, noise, of_masked = (noises[-1], *noises[:2]) if skips else noises
    picture = sample("image_latents", 1, of_picture)
    if strength == 1.0:
        sampler.restart()
        assert first.latents.equal(noise * sampler.initial_noise_scale)
    else:
        assert torch.allclose(first.latents, sampler.add_noise(picture, noise))
    assert (first.original is None) == skips
    assert first.masked is not None
    assert torch.allclose(first.masked, sample("masked_image_latents", 1, of_masked))
    assert begin.masks is not None and begin.masks.equal(TENSORS["latent_masks"][1:])


def test_with_soft_masks_the_picture_is_in_the_noise_at_any_strength() -> None:
    sampler = sampler_of(strength=1.0)
    begin = FromMaskedPictures(TENSORS, [1], VAE, by_channels=False, soft=True)
    assert begin.soft_masks and not FromPictures(TENSORS, [1], VAE).soft_masks
    first, (of_picture, noise, _) = draw(begin, sampler)
    picture = sample("image_latents", 1, of_picture)
    assert torch.allclose(first.latents, sampler.add_noise(picture, noise))


def test_an_edited_picture_lies_beside_the_noise() -> None:
    """It is the posterior's mode, and draws nothing."""
    sampler = sampler_of()
    means = TENSORS["image_latents_mean"]
    first, (noise, *_) = draw(FromEditedPictures(means, [1], 0.25), sampler)
    assert first.latents.equal(noise * sampler.initial_noise_scale)
    assert first.edited is not None and first.edited.equal(means[1:] * 0.25)


def test_several_are_one_batch() -> None:
    sampler: Any = sampler_of(strength=0.5)
    begin = FromPictures(TENSORS, [0, 1], VAE)
    each = [draw(begin, sampler, index)[0] for index in range(2)]
    both = First.of(each)
    assert both.original is not None and both.masked is None
    np.testing.assert_array_equal(both.latents[1], each[1].latents[0])
    assert both.original.shape == (2, *SHAPE)
