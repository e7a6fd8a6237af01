"""Norms and attention beside float64, torch's own float32 and torchax's default operations."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jax.experimental.pallas import tpu as pltpu

from common.compute.fast_ops import attention, conv2d, gelu, group_norm, layer_norm
from common.compute.sharding import SINGLE, ActivationLayout, make_mesh
from common.compute.torchax_runtime import as_jax_function
from common.sampling.jax_denoiser import prepare_model

GENERATOR = torch.Generator().manual_seed(3)


def random(*shape: int, mean: float = 0.0) -> torch.Tensor:
    return torch.randn(shape, generator=GENERATOR) + mean


def error(actual: Any, exact: torch.Tensor) -> float:
    return float((torch.as_tensor(np.array(actual, np.float64)) - exact).norm() / exact.norm())


class Call(torch.nn.Module):
    """A torch function as a module, for torchax."""

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *arguments: torch.Tensor) -> torch.Tensor:
        return self.function(*arguments)


def by_torchax(function: Callable[..., torch.Tensor], *arguments: torch.Tensor) -> np.ndarray:
    """torchax's default operation in bfloat16."""
    arrays = [jnp.asarray(argument.numpy(), jnp.bfloat16) for argument in arguments]
    return np.asarray(jax.jit(as_jax_function(Call(function)))({}, *arrays), np.float64)


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


@pytest.mark.parametrize("mean", [0.0, 3.0])
@pytest.mark.parametrize("norm", NORMS)
def test_norms_in_bfloat16_are_closer_than_torchaxs(norm: str, mean: float) -> None:
    shape, torchs, ours, channels = NORMS[norm]
    tensors = [random(*shape, mean=mean), random(channels), random(channels)]
    tensors = [tensor.bfloat16().float() for tensor in tensors]
    exact = torchs(*(tensor.double() for tensor in tensors))
    arrays = [jnp.asarray(tensor.numpy(), jnp.bfloat16) for tensor in tensors]
    result = jax.jit(ours)(*arrays)
    assert result.dtype == jnp.bfloat16
    assert error(result, exact) < error(by_torchax(torchs, *tensors), exact)


SHAPES = {
    "self": ((2, 5, 256, 64), (2, 5, 256, 64)),
    "cross": ((2, 5, 256, 64), (2, 5, 77, 64)),
    "one head of the VAE": ((1, 1, 256, 512), (1, 1, 256, 512)),
}


@pytest.mark.parametrize("sharpness", [1.0, 5.0])
@pytest.mark.parametrize("shapes", SHAPES)
def test_attention_is_as_exact_as_torchs(shapes: str, sharpness: float) -> None:
    queries, keys = SHAPES[shapes]
    tensors = [random(*queries) * sharpness, random(*keys), random(*keys)]
    exact = F.scaled_dot_product_attention(*(tensor.double() for tensor in tensors))

    def ours(*arrays: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            return attention(*arrays, layout=None, platform="cpu")

    arrays = [jnp.asarray(tensor.numpy()) for tensor in tensors]
    own = error(F.scaled_dot_product_attention(*tensors), exact)
    # XLA on CPU adds a product's terms up in one chain, so 512 of them cost a little more.
    factor = 2 if queries[-1] <= 256 else 3
    assert error(jax.jit(ours)(*arrays), exact) <= factor * own

    rounded = [tensor.bfloat16().float() for tensor in tensors]
    exact = F.scaled_dot_product_attention(*(tensor.double() for tensor in rounded))
    arrays = [jnp.asarray(tensor.numpy(), jnp.bfloat16) for tensor in rounded]
    result = jax.jit(ours)(*arrays)
    assert result.dtype == jnp.bfloat16
    default = by_torchax(F.scaled_dot_product_attention, *rounded)
    assert error(result, exact) < error(default, exact)


@pytest.mark.parametrize(("queries", "keys"), [(64, 1024), (252, 1008), (37, 1100)])
def test_the_kernel_for_tpus_attends_to_exactly_its_keys(queries: int, keys: int) -> None:
    """Interpreted on the CPU; 1008 tokens of 1152×896 are no multiple of the kernel's 128."""
    tensors = [random(2, 2, queries, 64), random(2, 2, keys, 64) + 1, random(2, 2, keys, 64) + 1]
    exact = F.scaled_dot_product_attention(*(tensor.double() for tensor in tensors))
    arrays = [jnp.asarray(tensor.numpy()) for tensor in tensors]
    with pltpu.force_tpu_interpret_mode(), jax.default_matmul_precision("highest"):
        found = attention(*arrays, layout=None, platform="tpu")
    assert error(found, exact) < 1e-5


def test_float32_on_gpus_is_attended_to_without_cudnn() -> None:
    tensors = [random(1, 2, 64, 64), random(1, 2, 1100, 64), random(1, 2, 1100, 64)]
    exact = F.scaled_dot_product_attention(*(tensor.double() for tensor in tensors))
    arrays = [jnp.asarray(tensor.numpy()) for tensor in tensors]
    assert error(attention(*arrays, layout=None, platform="gpu"), exact) < 1e-5


def test_float32_models_have_float32_products_everywhere() -> None:
    """Also where the prompts are projected, outside of the UNet's own call."""
    block = torch.nn.ModuleDict({"attn2": torch.nn.ModuleDict()})
    block["attn2"]["to_k"] = torch.nn.Linear(8, 4, bias=False)
    unet = torch.nn.ModuleDict({"block": block})
    parameters = {"block.attn2.to_k.weight": jnp.ones((4, 8))}
    program = jax.make_jaxpr(lambda p, x: prepare_model(unet, p, x, "fast")[1])(
        parameters, jnp.ones((1, 3, 8))
    )
    assert str(program).count("dot_general") == 1
    assert "HIGHEST" in str(program)


def test_attention_with_a_mask_is_refused() -> None:
    x = jnp.zeros((1, 1, 4, 8))
    with pytest.raises(NotImplementedError):
        attention(x, x, x, is_causal=True, layout=None, platform="cpu")


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
    by_rows = case not in ("many pictures", "rows that a stride does not divide")
    assert error(result, exact) < 2**-9 * (1 if by_rows else 1.5)


def to_hwio(weight: torch.Tensor) -> np.ndarray:
    return weight.permute(2, 3, 1, 0).contiguous().numpy()


@pytest.mark.parametrize(("size", "stride", "permutes"), [(3, 1, 2), (3, 2, 1), (1, 1, 0)])
def test_a_convolution_over_split_rows_exchanges_its_borders_once(
    size: int, stride: int, permutes: int
) -> None:
    mesh = make_mesh(SINGLE | {"cfg": 2, "rows": 4}, jax.devices())
    layout = ActivationLayout.of(mesh, guided=True, rows_of_levels=[16])
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
