"""Attention as pure jax functions and kernels, in place of torchax's own."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from common.compute.sharding import ActivationLayout

# Below this many keys (a prompt's 77, a small picture's) a kernel is not worth its start.
FEWEST_KEYS_FOR_KERNEL = 768

KEY_TILE, QUERY_TILE = 128, 8  # the Pallas kernel takes keys and queries in multiples of these

BLOCK_BYTES = 2**19  # of queries or keys at once: with more, heads of the VAE's 512 do not fit

MOST_CUDNN_HEAD = 128  # the largest head that cuDNN's kernel takes on every GPU, in multiples of 8


def attention(
    query: Array,
    key: Array,
    value: Array,
    attn_mask: None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    layout: ActivationLayout | None,
    platform: str,
) -> Array:
    """torch's `scaled_dot_product_attention` without a mask.

    Args:
        query: [N, heads, S, d]; its S, rows of the picture, stay split over the mesh.
        key, value: [N, heads, T, d]; gathered, every device needs all of them.
        layout: how N and S are split.
        platform: tpu, gpu or cpu.
    """
    if attn_mask is not None or is_causal or dropout_p or enable_gqa:
        raise NotImplementedError("diffusers' UNets and VAEs attend to everything")
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    if layout is not None:
        key, value = (_constrain(array, layout, None) for array in (key, value))
        query = _constrain(query, layout, layout.rows)
    kernel = _kernel_for(query, key, platform)
    if kernel is not None:
        return _on_each_device(partial(kernel, scale=scale), layout)(query, key, value)
    dtype = query.dtype
    if platform == "cpu":
        query, key, value = (array.astype(jnp.float32) for array in (query, key, value))
    scores = jnp.einsum("nhsd,nhtd->nhst", query, key, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores * scale, axis=-1).astype(value.dtype)
    return jnp.einsum("nhst,nhtd->nhsd", weights, value).astype(dtype)


def _constrain(x: Array, layout: ActivationLayout, rows: Any) -> Array:
    """Split [N, heads, S, d]; the heads are the partitioner's to split."""
    spec = PartitionSpec(layout.batch, PartitionSpec.UNCONSTRAINED, rows, None)
    return jax.lax.with_sharding_constraint(x, NamedSharding(layout.mesh, spec))


def _kernel_for(query: Array, key: Array, platform: str) -> Callable[..., Array] | None:
    """The platform's own kernel for attention, where it takes these arrays."""
    keys, head = key.shape[2], key.shape[3]
    if keys < FEWEST_KEYS_FOR_KERNEL:
        return None
    if platform == "tpu":
        return _pallas_attention
    fits_cudnn = head <= MOST_CUDNN_HEAD and head % 8 == 0
    if platform == "gpu" and fits_cudnn and query.dtype in (jnp.bfloat16, jnp.float16):
        return _cudnn_attention
    return None


def _pallas_attention(query: Array, key: Array, value: Array, *, scale: float) -> Array:
    """jax's bundled Pallas kernel for TPUs (Dao et al. 2022).

    Numbers of queries and keys that it does not take are filled up; what is filled up belongs to
    another segment, which no query attends to.
    """
    from jax.experimental.pallas.ops.tpu.flash_attention import (
        BlockSizes,
        SegmentIds,
        flash_attention,
    )

    batch, _, queries, head = query.shape
    keys = key.shape[2]
    missing_queries, missing_keys = -queries % QUERY_TILE, -keys % KEY_TILE
    segments = None
    if missing_queries:
        query = jnp.pad(query, ((0, 0), (0, 0), (0, missing_queries), (0, 0)))
    if missing_keys:
        filling = ((0, 0), (0, 0), (0, missing_keys), (0, 0))
        key, value = jnp.pad(key, filling), jnp.pad(value, filling)
        of_keys = jnp.arange(key.shape[2]) >= keys
        segments = SegmentIds(
            q=jnp.zeros((batch, query.shape[2]), jnp.int32),
            kv=jnp.broadcast_to(of_keys.astype(jnp.int32), (batch, key.shape[2])),
        )
    most = min(1024, BLOCK_BYTES // (head * query.dtype.itemsize))
    block_k = _block(key.shape[2], most, KEY_TILE)
    sizes = BlockSizes(
        block_q=_block(query.shape[2], most, QUERY_TILE),
        block_k_major=block_k,
        block_k=block_k,
        block_b=1,
    )
    # Kernels know no products between those of one bfloat16 and of float32.
    precision = "highest" if query.dtype == jnp.float32 else None
    with jax.default_matmul_precision(precision):
        result = flash_attention(
            query, key, value, segment_ids=segments, sm_scale=scale, block_sizes=sizes
        )
    return result[:, :, :queries]


def _cudnn_attention(query: Array, key: Array, value: Array, *, scale: float) -> Array:
    """cuDNN's kernel for 16-bit numbers, by jax; it takes [N, S, heads, d]."""
    query, key, value = (array.swapaxes(1, 2) for array in (query, key, value))
    result = jax.nn.dot_product_attention(query, key, value, scale=scale, implementation="cudnn")
    return result.swapaxes(1, 2)


def _on_each_device(
    kernel: Callable[[Array, Array, Array], Array], layout: ActivationLayout | None
) -> Callable[[Array, Array, Array], Array]:
    """A kernel that the partitioner cannot split, called on each device's own queries."""
    if layout is None:
        return kernel

    def split(query: Array, key: Array, value: Array) -> Array:
        heads = "tensor" if query.shape[1] % layout.mesh.shape["tensor"] == 0 else None
        own = PartitionSpec(layout.batch, heads, layout.rows, None)
        whole = PartitionSpec(layout.batch, heads, None, None)
        return jax.shard_map(
            kernel,
            mesh=layout.mesh,
            in_specs=(own, whole, whole),
            out_specs=own,
            check_vma=False,
        )(query, key, value)

    return split


def _block(length: int, most: int, tile: int) -> int:
    """The largest multiple of `tile` up to `most` that divides a length."""
    return max(size for size in range(tile, max(most, tile) + 1, tile) if length % size == 0)
