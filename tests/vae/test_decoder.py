"""Scaling before the VAE and rounding after it."""

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor

from common.vae.decoder import to_pixels, unscale_latents


def test_scaling_is_undone() -> None:
    """By numbers that a head can check."""
    latents = np.ones((1, 2, 1, 1), np.float32)
    assert unscale_latents(latents, {"scaling_factor": 0.5}).ravel().tolist() == [2, 2]
    config = {"scaling_factor": 0.5, "latents_mean": [3, -1], "latents_std": [4, 0.5]}
    unscaled = unscale_latents(latents, config)
    assert unscaled.ravel().tolist() == [4 / 0.5 + 3, 0.5 / 0.5 - 1]
    assert unscaled.dtype == np.float32
    incomplete = config | {"latents_std": None}  # as diffusers, which wants both
    assert unscale_latents(latents, incomplete).ravel().tolist() == [2, 2]


def test_pixels_are_those_of_diffusers_image_processor() -> None:
    images = np.random.default_rng(1).normal(size=(2, 3, 8, 6)).astype(np.float32)
    images[0, 0, 0, :4] = [-1, 1, -7, 7]
    expected = VaeImageProcessor().postprocess(torch.from_numpy(images), output_type="pil")
    pixels, finite = to_pixels(images)
    assert finite
    np.testing.assert_array_equal(pixels, np.stack([np.asarray(image) for image in expected]))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_told(value: float) -> None:
    images = np.zeros((2, 3, 4, 4), np.float32)
    images[1, 2, 3, 3] = value
    assert not to_pixels(images)[1]
