"""What TPUs compute for float32 in the VAE, three products of bfloat16, leaves the same pixels."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from jax import Array

from common.compute import fast_ops
from common.compute.torchax_runtime import as_jax_function
from common.models.checkpoint import Checkpoint
from common.vae.jax_runner import JaxRunner, decode, to_pixels
from tests.conftest import PROJECT_DIR
from tests.vae.test_jax_runner import load
from tests.vae.tiny_vae import largest_difference, random_latents

F = torch.nn.functional


def three(product: Callable[[Array, Array], Array], a: Array, b: Array) -> Array:
    """XLA's BF16_BF16_F32_X3: of two parts of each factor all but the product of the small ones."""

    def parts(x: Array) -> tuple[Array, Array]:
        large = jax.lax.reduce_precision(x, 8, 7)
        return large, jax.lax.reduce_precision(x - large, 8, 7)

    (a_large, a_small), (b_large, b_small) = parts(a), parts(b)
    return product(a_large, b_large) + product(a_large, b_small) + product(a_small, b_large)


def conv2d(x: Array, weight: Array, bias: Array | None = None, *rest: Any, **more: Any) -> Array:
    own = {"layout": None, "platform": "cpu"}
    found = three(lambda a, b: fast_ops.conv2d(a, b, None, *rest, **more, **own), x, weight)
    return found if bias is None else found + bias[:, None, None]


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    found = three(lambda a, b: fast_ops.linear(a, b), x, weight)
    return found if bias is None else found + bias


def pictures(runner: JaxRunner, latents: np.ndarray, *replaced: dict[Any, Any]) -> np.ndarray:
    """Decoded by our operations, some of them replaced."""
    operations = fast_ops.replacements(None, "cpu", "fast")
    for more in replaced:
        operations = operations | more
    half = as_jax_function(runner.vae.module, decode, replacements=operations)
    pixels, finite = jax.jit(lambda p, x: to_pixels(half(p, x)))(
        runner.vae.parameters, jnp.asarray(latents)
    )
    assert finite
    return np.asarray(pixels)


def save_full_size(folder: Path) -> Checkpoint:
    """SDXL's VAE with random weights."""
    torch.manual_seed(0)
    config = AutoencoderKL.load_config(PROJECT_DIR / "models" / "sdxl_base" / "vae")
    AutoencoderKL.from_config(config).save_pretrained(folder / "vae")
    return Checkpoint(str(folder), folder)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        ("demo", (1, 4, 16, 16)),
        pytest.param("full size", (1, 4, 16, 16), marks=pytest.mark.slow),
    ],
)
def test_three_products_leave_the_pixels(model: str, shape: Sequence[int], tmp_path: Path) -> None:
    folder = PROJECT_DIR / "models" / "demo"
    checkpoint = Checkpoint(str(folder), folder) if model == "demo" else save_full_size(tmp_path)
    runner = load(checkpoint, "single", {}).runner
    latents = 5 * random_latents(*shape)
    exact = pictures(runner, latents)
    assert exact.std() > 5  # no even picture
    found = pictures(runner, latents, {F.conv2d: conv2d, F.linear: linear})
    assert largest_difference(found, exact) <= 1
    one = {F.conv2d: lambda *a, **k: conv2d_of_one(*a, **k)}
    assert largest_difference(pictures(runner, latents, one), exact) > 1  # which would not do


def conv2d_of_one(x: Array, weight: Array, *rest: Any, **more: Any) -> Array:
    """A product of bfloat16 alone."""
    x, weight = (jax.lax.reduce_precision(each, 8, 7) for each in (x, weight))
    return fast_ops.conv2d(x, weight, *rest, **more, layout=None, platform="cpu")
