"""Attention over split rows, and where a platform's own kernel takes over."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch.nn.functional as F
from jax.experimental.pallas import tpu as pltpu

from common.compute import attention as module
from common.compute.attention import FEWEST_KEYS_FOR_KERNEL, attention
from common.compute.sharding import SINGLE, ActivationLayout, make_mesh
from tests.compute.exactness import by_torchax, error, random


@pytest.mark.parametrize("sizes", [{"data": 2, "rows": 4}, {"cfg": 2, "rows": 2, "tensor": 2}])
@pytest.mark.parametrize("keys", [64, 7], ids=["self", "cross"])
def test_split_rows_attend_to_every_key(sizes: dict[str, int], keys: int) -> None:
    tensors = [random(2, 2, 64, 8), random(2, 2, keys, 8), random(2, 2, keys, 8)]
    expected = F.scaled_dot_product_attention(*(tensor.double() for tensor in tensors)).numpy()
    mesh = make_mesh(SINGLE | sizes, jax.devices())
    layout = ActivationLayout.of(mesh, predictions=2, rows_of_levels=[8])
    arrays = [jnp.asarray(tensor.numpy()) for tensor in tensors]
    function = jax.jit(lambda *arrays: attention(*arrays, layout=layout, platform="cpu"))
    found = function(*arrays)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    # Each device has its own queries' rows.
    assert found.addressable_shards[0].data.shape[2] == 64 // sizes["rows"]


def test_scale_is_as_torchs() -> None:
    tensors = [random(1, 1, 5, 16) for _ in range(3)]
    arrays = [jnp.asarray(tensor.numpy()) for tensor in tensors]
    found = attention(*arrays, scale=0.7, layout=None, platform="cpu")
    expected = F.scaled_dot_product_attention(*tensors, scale=0.7)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("platform", "keys", "head", "dtype", "kernel"),
    [
        ("tpu", 4096, 64, jnp.float32, module._pallas_attention),
        ("tpu", 77, 64, jnp.bfloat16, None),  # a prompt is not worth a kernel's start
        ("tpu", FEWEST_KEYS_FOR_KERNEL, 40, jnp.bfloat16, module._pallas_attention),
        ("gpu", 4096, 64, jnp.bfloat16, module._cudnn_attention),
        ("gpu", 4096, 64, jnp.float32, None),  # cuDNN's are for 16 bits
        ("gpu", 4096, 512, jnp.bfloat16, None),  # the VAE's one head
        ("gpu", 4096, 44, jnp.bfloat16, None),
        ("cpu", 4096, 64, jnp.float32, None),
    ],
)
def test_which_kernel(
    platform: str, keys: int, head: int, dtype: jnp.dtype, kernel: object
) -> None:
    array = jax.ShapeDtypeStruct((1, 2, keys, head), dtype)
    assert module._kernel_for(array, array, platform) is kernel


@pytest.mark.parametrize("rows", [1, 2])
def test_a_kernel_gets_each_devices_own_queries(rows: int) -> None:
    """One that the partitioner cannot split: heads over `tensor`, queries over `rows`."""
    mesh = make_mesh(SINGLE | {"data": 2, "rows": rows, "tensor": 2}, jax.devices())
    layout = ActivationLayout.of(mesh, predictions=1, rows_of_levels=[8])
    seen = []

    def kernel(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        seen.append((query.shape, key.shape))
        return attention(query, key, value, layout=None, platform="cpu")

    tensors = [random(2, 4, 16, 8), random(2, 4, 12, 8), random(2, 4, 12, 8)]
    arrays = [jnp.asarray(tensor.numpy()) for tensor in tensors]
    found = jax.jit(module._on_each_device(kernel, layout))(*arrays)
    assert set(seen) == {((1, 2, 16 // rows, 8), (1, 2, 12, 8))}
    expected = F.scaled_dot_product_attention(*(tensor.double() for tensor in tensors))
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)


@pytest.mark.parametrize("how", [{"is_causal": True}, {"dropout_p": 0.1}, {"enable_gqa": True}])
def test_what_no_model_asks_for_is_refused(how: dict[str, object]) -> None:
    array = jnp.zeros((1, 1, 2, 8))
    with pytest.raises(NotImplementedError):
        attention(array, array, array, layout=None, platform="cpu", **how)  # type: ignore[arg-type]


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


def test_attention_with_a_mask_is_refused() -> None:
    x = jnp.zeros((1, 1, 4, 8))
    with pytest.raises(NotImplementedError):
        attention(x, x, x, is_causal=True, layout=None, platform="cpu")
