"""Norms, gelu and convolutions beside float64, torch's own float32 and torchax's default."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.compute.fast_ops import conv2d, gelu, group_norm, layer_norm
from common.compute.sharding import SINGLE, ActivationLayout, make_mesh
from tests.compute.exactness import by_torchax, error, random

NORMS = {
    "group": (
        (2, 64, 16, 24),
        lambda x, w, b: F.group_norm(x, 32, w, b, 1e-5),
        lambda x, w, b: group_norm(x, 32, w, b, 1e-5),
        64,
    ),
    "group, tokens": (
        (2, 64, 384),
        lambda x, w, b: F.group_norm(x, 8, w, b, 1e-6),
        lambda x, w, b: group_norm(x, 8, w, b, 1e-6),
        64,
    ),
    "layer": (
        (2, 77, 640),
        lambda x, w, b: F.layer_norm(x, (640,), w, b, 1e-5),
        lambda x, w, b: layer_norm(x, (640,), w, b, 1e-5),
        640,
    ),
}


@pytest.mark.parametrize("mean", [0.0, 1.0, 10.0, 30.0])
@pytest.mark.parametrize("norm", NORMS)
def test_norms_are_as_exact_as_torchs(norm: str, mean: float) -> None:
    shape, torchs, ours, channels = NORMS[norm]
    x, weight, bias = random(*shape, mean=mean), random(channels), random(channels)
    exact = torchs(*(tensor.double() for tensor in (x, weight, bias)))
    arrays = [jnp.asarray(tensor.numpy()) for tensor in (x, weight, bias)]
    assert error(jax.jit(ours)(*arrays), exact) <= 2 * error(torchs(x, weight, bias), exact)


@pytest.mark.parametrize("mean", [0.0, 3.0, 30.0, 100.0])
@pytest.mark.parametrize("norm", NORMS)
def test_norms_in_bfloat16_are_closer_than_torchaxs(norm: str, mean: float) -> None:
    """Close to what rounding the exact result would leave, although in one pass."""
    shape, torchs, ours, channels = NORMS[norm]
    tensors = [random(*shape, mean=mean), random(channels), random(channels)]
    tensors = [tensor.bfloat16().float() for tensor in tensors]
    exact = torchs(*(tensor.double() for tensor in tensors))
    arrays = [jnp.asarray(tensor.numpy(), jnp.bfloat16) for tensor in tensors]
    result = jax.jit(ours)(*arrays)
    assert result.dtype == jnp.bfloat16
    assert error(result, exact) < error(by_torchax(torchs, *tensors), exact)
    assert error(result, exact) <= 1.1 * error(exact.bfloat16().double(), exact)


def test_gelu_in_bfloat16_on_tpus_is_closer_than_torchaxs() -> None:
    x = torch.cat([torch.linspace(-30, 30, 6001), random(20000)]).bfloat16().float()
    exact = F.gelu(x.double())
    result = gelu(jnp.asarray(x.numpy(), jnp.bfloat16), platform="tpu")
    assert result.dtype == jnp.bfloat16
    assert error(result, exact) <= error(by_torchax(F.gelu, x), exact)
    wide = np.asarray(result, np.float64)
    rounding = np.abs(exact.numpy()) * 2**-8 + 3e-5
    assert (np.abs(wide - exact.numpy()) <= rounding).all()


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_gelu_in_float32_is_exact(platform: str) -> None:
    x = random(20000) * 3
    exact = F.gelu(x.double())
    ours = gelu(jnp.asarray(x.numpy()), platform=platform)
    assert error(ours, exact) <= 2 * error(F.gelu(x), exact)


CONVOLUTIONS = {
    "3×3": ((2, 24, 16, 12), 3, 1, 1),
    "1×1": ((1, 24, 16, 12), 1, 1, 0),
    "downsampling": ((2, 24, 16, 12), 3, 2, 1),
    "5×5": ((1, 24, 16, 12), 5, 1, 2),
    "many pictures": ((9, 8, 8, 8), 3, 1, 1),
    "rows that a stride does not divide": ((1, 8, 9, 8), 3, 2, 1),
    "no padding": ((1, 8, 8, 8), 3, 1, 0),
    "no padding, halved": ((1, 8, 9, 9), 3, 2, 0),
    "no padding, a row too many": ((1, 8, 8, 8), 3, 2, 0),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions_by_rows_are_as_exact_as_torchs(case: str) -> None:
    """The way that TPUs take, on the CPU."""
    shape, size, stride, padding = CONVOLUTIONS[case]
    x, bias = random(*shape), random(32)
    weight = random(32, shape[1], size, size)
    exact = F.conv2d(x.double(), weight.double(), bias.double(), stride, padding)
    by_torch = error(F.conv2d(x, weight, bias, stride, padding), exact)

    def ours(dtype: Any) -> jax.Array:
        arrays = [jnp.asarray(a, dtype) for a in (x.numpy(), to_hwio(weight), bias.numpy())]
        function = partial(conv2d, stride=stride, padding=padding, layout=None, platform="tpu")
        return jax.jit(function)(*arrays)

    with jax.default_matmul_precision("highest"):
        assert error(ours(jnp.float32), exact) <= 2 * by_torch
    rounded = [tensor.bfloat16().float() for tensor in (x, weight, bias)]
    exact = F.conv2d(*(tensor.double() for tensor in rounded), stride, padding)
    result = ours(jnp.bfloat16)
    assert result.dtype == jnp.bfloat16
    # One rounding at the end, to 8 bits; XLA's own convolution rounds before the bias as well.
    by_xla = ("many pictures", "rows that a stride does not divide", "no padding, a row too many")
    by_rows = case not in by_xla
    assert error(result, exact) < 2**-9 * (1 if by_rows else 1.5)


def to_hwio(weight: torch.Tensor) -> np.ndarray:
    return weight.permute(2, 3, 1, 0).contiguous().numpy()


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_rows_beyond_a_pictures_own_are_its_last_borders(rows: int) -> None:
    """As diffusers' VAE encoders pad pictures below and to the right, and halve them then."""
    mesh = make_mesh(SINGLE | {"rows": rows}, jax.devices()[:rows])
    layout = ActivationLayout.of(mesh, predictions=1, rows_of_levels=[32])
    x, weight, bias = random(1, 24, 32, 12), random(32, 24, 3, 3), random(32)
    expected = F.conv2d(
        F.pad(x, (0, 1, 0, 1), value=0.7).double(), weight.double(), bias.double(), 2
    )
    put = jax.device_put(x.numpy(), layout.pictures())

    def ours(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
        padded = jnp.pad(x, ((0, 0), (0, 0), (0, 1), (0, 1)), constant_values=0.7)
        return conv2d(padded, weight, bias, 2, 0, layout=layout, platform="tpu")

    program = (
        jax.jit(ours, out_shardings=layout.pictures())
        .lower(put, to_hwio(weight), bias.numpy())
        .compile()
    )
    assert error(program(put, to_hwio(weight), bias.numpy()), expected) < 1e-6
    text = program.as_text()
    assert "all-gather" not in text and "all-to-all" not in text


@pytest.mark.parametrize(("size", "stride", "permutes"), [(3, 1, 2), (3, 2, 1), (1, 1, 0)])
def test_a_convolution_over_split_rows_exchanges_its_borders_once(
    size: int, stride: int, permutes: int
) -> None:
    mesh = make_mesh(SINGLE | {"cfg": 2, "rows": 4}, jax.devices())
    layout = ActivationLayout.of(mesh, predictions=2, rows_of_levels=[16])
    x, weight, bias = random(2, 24, 16, 12), random(32, 24, size, size), random(32)
    expected = F.conv2d(x.double(), weight.double(), bias.double(), stride, size // 2)
    function = partial(conv2d, stride=stride, padding=size // 2, layout=layout, platform="tpu")
    put = jax.device_put(x.numpy(), layout.pictures())
    program = (
        jax.jit(function, out_shardings=layout.pictures())
        .lower(put, to_hwio(weight), bias.numpy())
        .compile()
    )
    assert error(program(put, to_hwio(weight), bias.numpy()), expected) < 1e-6
    text = program.as_text()
    assert len(re.findall(r"= \S+ collective-permute(?:-start)?\(", text)) == permutes
    assert "all-gather" not in text and "all-reduce" not in text
