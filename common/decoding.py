"""The compiled decoding program: latents to 8-bit pictures."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from common.torchax_runtime import Parameters


def unscale_latents(latents: Array, config: dict[str, Any]) -> Array:
    """Undo the VAE's own scaling of its latents, as diffusers' SDXL pipeline does.

    Args:
        latents: [B, C, h, w] float32.
        config: the VAE's config.
    """
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        mean, std = (
            jnp.asarray(values, jnp.float32).reshape(1, -1, 1, 1) for values in (mean, std)
        )
        return latents * std / config["scaling_factor"] + mean
    return latents / config["scaling_factor"]


def make_decoder(
    decode: Callable[..., Any], config: dict[str, Any], dtype: Any
) -> Callable[[Parameters, Array], tuple[Array, Array]]:
    """Make the function to compile: latents [B, C, h, w] to [B, H, W, 3] uint8.

    The second result says whether the decoded values were finite.
    """

    def decode_latents(parameters: Parameters, latents: Array) -> tuple[Array, Array]:
        with jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default"):
            scaled = unscale_latents(latents, config).astype(dtype)
            images = decode(parameters, scaled, return_dict=False)[0].astype(jnp.float32)
        # diffusers' VaeImageProcessor: denormalize, clamp, to 8 bits by rounding.
        pixels = jnp.round(jnp.clip(images / 2 + 0.5, 0, 1) * 255).astype(jnp.uint8)
        return pixels.transpose(0, 2, 3, 1), jnp.isfinite(images).all()

    return decode_latents


def make_grid(pictures: np.ndarray) -> np.ndarray:
    """Lay [B, H, W, 3] pictures out row by row, as square as possible, the rest white."""
    count, height, width, channels = pictures.shape
    columns = int(np.ceil(np.sqrt(count)))
    rows = int(np.ceil(count / columns))
    grid = np.full((rows * columns, height, width, channels), 255, np.uint8)
    grid[:count] = pictures
    laid_out = grid.reshape(rows, columns, height, width, channels).transpose(0, 2, 1, 3, 4)
    return laid_out.reshape(rows * height, columns * width, channels)
