"""Attention and norms as pure jax functions, in place of torchax's own.

torchax's group norm lowers to a loop and rounds its statistics to bfloat16, and its attention
writes all scores to memory and takes the softmax in bfloat16. These keep statistics and softmax in
float32; attention over pictures runs in jax's bundled Pallas kernel on TPUs, in cuDNN's on GPUs.
docs/decisions.md has what each of them gains.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import Array
from jax.sharding import PartitionSpec

from common.compute.attention import attention
from common.compute.sharding import ActivationLayout

# Of more pictures on a device XLA's own convolution makes a good batch.
MOST_PICTURES_BY_ROWS = 4

# Least largest error of 0.5·x·(1 + tanh(x·(a + b·x² + c·x⁴))) against the gelu on [0, 6].
ERF_AS_TANH = (0.7975052754, 0.0370080200, -0.000351902393)

NORMS = (torch.nn.GroupNorm, torch.nn.LayerNorm)


def norm_weights(module: torch.nn.Module) -> set[str]:
    """The names of a model's norms' weights and biases, which are used in float32."""
    return {
        f"{name}.{kind}"
        for name, submodule in module.named_modules()
        if isinstance(submodule, NORMS)
        for kind, _ in submodule.named_parameters()
    }


def products_for(dtype: Any, *, of_float32: str = "highest") -> Any:
    """float32 weights ask for float32 products, which TPUs and GPUs otherwise round.

    Args:
        of_float32: as jax names precisions. On TPUs "high" is three products of bfloat16 in place
            of six, whose errors are some 2⁻¹⁶ of a factor.
    """
    return jax.default_matmul_precision(of_float32 if dtype == jnp.float32 else "default")


def conv2d(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    stride: Sequence[int] | int = 1,
    padding: Sequence[int] | int | str = 0,
    dilation: Sequence[int] | int = 1,
    groups: int = 1,
    *,
    layout: ActivationLayout | None,
    platform: str,
) -> Array:
    """torch's `conv2d` of [N, C, h, w] with a weight that lies as `arrange_weight` lays it."""

    def pair(value: Sequence[int] | int) -> tuple[int, int]:
        return (value, value) if isinstance(value, int) else (value[0], value[1])

    if platform == "tpu" and not isinstance(padding, str):
        rows, own, beyond = _RowsOfKernel.of(weight, pair(stride), pair(padding)), x, None
        if pair(padding)[0] == 0 and rows.below > 0:  # the picture holds what is below its rows
            own, beyond = x[:, :, : -rows.below], x[:, :, -rows.below :]
        if groups == 1 and pair(dilation) == (1, 1) and rows.fit(own, layout):
            return _conv2d_by_rows(own, beyond, weight, bias, rows, layout)
    result = jax.lax.conv_general_dilated(
        x.astype(weight.dtype),
        weight,
        pair(stride),
        padding.upper() if isinstance(padding, str) else [(p, p) for p in pair(padding)],
        rhs_dilation=pair(dilation),
        dimension_numbers=("NCHW", "HWIO", "NCHW"),
        feature_group_count=groups,
    )
    result = result if bias is None else result + bias[:, None, None]
    return result.astype(x.dtype)


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """torch's `linear` of [..., in] with a weight [out, in], computed in the weight's dtype."""
    result = x.astype(weight.dtype) @ weight.T
    return (result if bias is None else result + bias).astype(x.dtype)


@dataclass(frozen=True)
class _RowsOfKernel:
    """How the rows of a convolution's kernel lie over those of a picture."""

    stride: tuple[int, int]
    above: int  # rows above a device's own that the kernel reaches
    below: int
    edge: int  # columns of zeros at both sides

    @classmethod
    def of(
        cls, weight: Array, stride: tuple[int, int], padding: tuple[int, int]
    ) -> "_RowsOfKernel":
        return cls(stride, padding[0], weight.shape[0] - stride[0] - padding[0], padding[1])

    def fit(self, x: Array, layout: ActivationLayout | None) -> bool:
        """Whether every device computes its share from few pictures and its neighbours' borders."""
        pictures, rows, rest = x.shape[0], x.shape[2], 0
        if layout is not None:
            pictures //= layout.size_of(layout.batch)
            rows, rest = divmod(rows, layout.size_of(layout.rows))
        return (
            pictures <= MOST_PICTURES_BY_ROWS
            and rest == 0
            and rows % self.stride[0] == 0
            and 0 <= self.below <= rows
            and self.above <= rows
        )


def _conv2d_by_rows(
    x: Array,
    beyond: Array | None,
    weight: Array,
    bias: Array | None,
    kernel: _RowsOfKernel,
    layout: ActivationLayout | None,
) -> Array:
    """A convolution as a sum of those along the width, one for each row of the kernel.

    Their batch are the rows of one picture, their sum is float32. A batch of few pictures is too
    small for XLA on TPUs, which cuts them into strips and lays activations out again around it.

    Args:
        beyond: the rows below the picture's, [N, C, below, w]; zeros else.
    """
    bias = jnp.zeros(weight.shape[-1], weight.dtype) if bias is None else bias

    def convolve(x: Array, weight: Array, bias: Array, beyond: Array | None) -> Array:
        x = _with_borders(x, kernel.above, kernel.below, layout, beyond)
        summed = jnp.stack([convolve_one(picture, weight) for picture in x])
        return (summed + bias.astype(jnp.float32)[:, None, None]).astype(x.dtype)

    def convolve_one(x: Array, weight: Array) -> Array:
        x = x.transpose(1, 2, 0)  # [h, w, C]
        step = kernel.stride[0]
        last = len(x) - kernel.above - kernel.below - step + 1
        summed = sum(
            jax.lax.conv_general_dilated(
                x[first : first + last : step],
                weight[first],
                kernel.stride[1:],
                [(kernel.edge, kernel.edge)],
                dimension_numbers=("NWC", "WIO", "NWC"),
                preferred_element_type=jnp.float32,
            )
            for first in range(len(weight))
        )
        return jnp.asarray(summed).transpose(2, 0, 1)

    if layout is None:
        return convolve(x, weight, bias, beyond)
    pictures = layout.pictures().spec
    return jax.shard_map(
        convolve,
        mesh=layout.mesh,
        in_specs=(pictures, PartitionSpec(), PartitionSpec(), PartitionSpec(pictures[0])),
        out_specs=pictures,
        check_vma=False,
    )(x, weight, bias, beyond)


def _with_borders(
    x: Array, above: int, below: int, layout: ActivationLayout | None, beyond: Array | None
) -> Array:
    """A device's rows of [N, C, h, w] and its neighbours' around them, zeros above the picture.

    Below it there are the rows `beyond`, or zeros.
    """
    devices = 1 if layout is None else layout.size_of(layout.rows)
    if layout is None or devices == 1:
        if beyond is not None:
            x, below = jnp.concatenate([x, beyond], 2), 0
        return jnp.pad(x, ((0, 0), (0, 0), (above, below), (0, 0)))
    parts = [x]
    if above:
        down = [(device, device + 1) for device in range(devices - 1)]
        parts.insert(0, jax.lax.ppermute(x[:, :, -above:], layout.rows, down))
    if below:
        up = [(device + 1, device) for device in range(devices - 1)]
        theirs = jax.lax.ppermute(x[:, :, :below], layout.rows, up)
        if beyond is not None:
            is_last = jax.lax.axis_index(layout.rows) == devices - 1
            theirs = jnp.where(is_last, beyond, theirs)
        parts.append(theirs)
    return jnp.concatenate(parts, 2)


def arrange_weight(name: str, array: np.ndarray, *, operations: str, platform: str) -> np.ndarray:
    """Lay a weight out as our operations want it: a convolution's as [kh, kw, in, out].

    XLA brings it there anyhow, on CPUs in every step. There it has no fast product of 16-bit
    numbers either, so their values are kept as float32.
    """
    if operations == "torchax":
        return array
    if platform == "cpu":
        array = array.astype(np.float32)
    is_convolution = array.ndim == 4 and name.endswith("weight")
    return array.transpose(2, 3, 1, 0) if is_convolution else array


def group_norm(
    x: Array,
    num_groups: int,
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
) -> Array:
    """torch's `group_norm` (Wu & He 2018) of [N, C, …], with float32 statistics in two passes."""
    channels = x.shape[1]
    grouped = x.reshape(x.shape[0], num_groups, channels // num_groups, *x.shape[2:])
    normed = _normalize(grouped, tuple(range(2, grouped.ndim)), eps).reshape(x.shape)
    per_channel = (channels,) + (1,) * (x.ndim - 2)
    return _scale_and_shift(normed, weight, bias, per_channel).astype(x.dtype)


def layer_norm(
    x: Array,
    normalized_shape: tuple[int, ...],
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
) -> Array:
    """torch's `layer_norm` (Ba et al. 2016), with float32 statistics in two passes."""
    axes = tuple(range(x.ndim - len(normalized_shape), x.ndim))
    normed = _normalize(x, axes, eps)
    return _scale_and_shift(normed, weight, bias, tuple(normalized_shape)).astype(x.dtype)


def _normalize(x: Array, axes: tuple[int, ...], eps: float) -> Array:
    """(x − mean) / √(variance + eps) as one product and one sum, like torch's own.

    Written with sums in place of means, so that XLA has no operation for a mean alone: every one
    costs its start on TPUs, however small it is.

    Of bfloat16 in one pass: both sums are part of what computes x, and over chips one collective.
    Its error in the variance, some 2⁻²² of mean², is less than what rounding to bfloat16 has put
    there, (2⁻⁹ mean)² / 3.
    """
    is_rounded = x.dtype == jnp.bfloat16
    x = x.astype(jnp.float32)
    count = math.prod(x.shape[axis] for axis in axes)
    total = jnp.sum(x, axes, keepdims=True)
    if is_rounded:
        squares = jnp.sum(jnp.square(x), axes, keepdims=True)
        variance = jnp.maximum(squares - jnp.square(total) / count, 0.0) / count
    else:
        squares = jnp.sum(jnp.square(x * count - total), axes, keepdims=True)  # times count²
        variance = squares / float(count) ** 3
    scale = jax.lax.rsqrt(variance + eps)
    return x * scale - total * scale / count


def _scale_and_shift(
    normed: Array, weight: Array | None, bias: Array | None, shape: tuple[int, ...]
) -> Array:
    if weight is not None:
        normed *= weight.astype(jnp.float32).reshape(shape)
    if bias is not None:
        normed += bias.astype(jnp.float32).reshape(shape)
    return normed


def gelu(x: Array, approximate: str = "none", *, platform: str) -> Array:
    """torch's `gelu` (Hendrycks & Gimpel 2016), in float32.

    A bfloat16 result on TPUs is taken from tanh(x·(a + b·x² + c·x⁴)), fitted to erf(x/√2) to
    2.6e-5 of the gelu, a hundredth of bfloat16's rounding at 1: tanh is one instruction there, erf
    some thirty.
    """
    wide = x.astype(jnp.float32)
    if approximate != "none" or platform != "tpu" or x.dtype != jnp.bfloat16:
        return jax.nn.gelu(wide, approximate=approximate == "tanh").astype(x.dtype)
    square = jnp.minimum(wide * wide, 40.0)  # beyond, tanh is 1 and the polynomial turns
    a, b, c = ERF_AS_TANH
    inner = wide * (a + square * (b + square * c))
    return (0.5 * wide * (1.0 + jnp.tanh(inner))).astype(x.dtype)


def finish(
    name: str,
    module: torch.nn.Module,
    x: Array,
    *,
    layout: ActivationLayout | None,
    platform: str,
) -> Array:
    """What is done to a submodule's output: fix how it is split, keep it from being fused badly."""
    if layout is not None:
        x = layout.constrain(name, module, x)
    # XLA would lay out pictures inside of the product that ends a transformer.
    if platform == "tpu" and name.endswith("proj_out") and x.ndim == 3:
        x = jax.lax.optimization_barrier(x)
    return x


def replacements(
    layout: ActivationLayout | None, platform: str, operations: str
) -> dict[Callable[..., Any], Callable[..., Array]]:
    """torch's functions and what stands in for them; nothing where `operations` are torchax's."""
    if operations == "torchax":
        return {}
    functional = torch.nn.functional
    # Elsewhere torchax's own product is what is wanted.
    products = {functional.linear: linear} if platform == "cpu" else {}
    return products | {
        functional.conv2d: partial(conv2d, layout=layout, platform=platform),
        functional.group_norm: group_norm,
        functional.layer_norm: layer_norm,
        functional.gelu: partial(gelu, platform=platform),
        functional.scaled_dot_product_attention: partial(
            attention, layout=layout, platform=platform
        ),
    }
