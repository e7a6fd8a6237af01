"""Pictures of 8 bits, as diffusers rounds them, and what is not finite."""

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor

from common.vae.runner import to_pixels


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
