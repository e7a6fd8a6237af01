"""The scaling of latents, by numbers that a head can check."""

import numpy as np

from common.vae.latent_scale import scale_latents, unscale_latents


def test_scaling_is_undone() -> None:
    latents = np.ones((1, 2, 1, 1), np.float32)
    assert unscale_latents(latents, {"scaling_factor": 0.5}).ravel().tolist() == [2, 2]
    config = {"scaling_factor": 0.5, "latents_mean": [3, -1], "latents_std": [4, 0.5]}
    unscaled = unscale_latents(latents, config)
    assert unscaled.ravel().tolist() == [4 / 0.5 + 3, 0.5 / 0.5 - 1]
    assert unscaled.dtype == np.float32
    incomplete = config | {"latents_std": None}  # as diffusers, which wants both
    assert unscale_latents(latents, incomplete).ravel().tolist() == [2, 2]


def test_scaling_is_what_is_undone() -> None:
    latents = np.arange(8, dtype=np.float32).reshape(2, 2, 1, 2)
    for more in ({}, {"latents_mean": [3, -1], "latents_std": [4, 0.5]}, {"latents_mean": [3, 4]}):
        config = {"scaling_factor": 0.5, **more}
        scaled = scale_latents(latents, config)
        assert scaled.dtype == np.float32
        np.testing.assert_allclose(unscale_latents(scaled, config), latents, atol=1e-6)
    np.testing.assert_array_equal(scale_latents(latents, {"scaling_factor": 0.5}), latents / 2)
