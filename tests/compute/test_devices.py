"""Arrays get to devices as they are, and weights without a second copy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import PartitionSpec

from common.compute import devices as module
from common.compute.devices import CPU_ALIGNMENT, Devices, device_facts, fetch
from common.compute.sharding import SINGLE, make_mesh, name_of, replicated, split_latents


def test_an_array_is_split_and_fetched_whole() -> None:
    devices = Devices.present()
    mesh = make_mesh(SINGLE | {"data": 2, "rows": 4}, devices.devices)
    latents = np.arange(4 * 3 * 8 * 2, dtype=np.float32).reshape(4, 3, 8, 2)
    put = devices.put({"latents": latents}, split_latents(mesh))["latents"]
    assert put.addressable_shards[0].data.shape == (2, 3, 2, 2)
    np.testing.assert_array_equal(fetch(put), latents)


def test_devices_that_are_not_there_get_descriptions() -> None:
    devices = Devices.described(jax.devices()[:4], 16)
    mesh = make_mesh(SINGLE | {"rows": 4}, devices.devices)
    described = devices.put(np.zeros((1, 4, 8, 8), np.float32), split_latents(mesh))
    assert isinstance(described, jax.ShapeDtypeStruct)
    assert described.sharding.shard_shape(described.shape) == (1, 4, 2, 8)
    with torch.device("meta"):
        weights = [("weight", torch.empty(2**20, 2**10, dtype=torch.bfloat16))]
    parameters = devices.put_weights(
        weights, lambda *_: replicated(mesh), arrange=lambda _, array: array.transpose()
    )
    assert parameters["weight"].shape == (2**10, 2**20)
    assert parameters["weight"].dtype == jnp.bfloat16
    assert devices.memory_bytes == 16


@pytest.mark.parametrize(("dtype", "waits"), [(torch.float32, 3), (torch.bfloat16, 2)])
def test_weights_arrive_one_by_one_and_as_they_are(
    dtype: torch.dtype, waits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 8 or 4 KB each, and the host waits as soon as more than 10 are under way."""
    waited: list[Any] = []
    wait = jax.block_until_ready
    monkeypatch.setattr(module, "MOST_UNDER_WAY", 10_000)
    monkeypatch.setattr(jax, "block_until_ready", lambda array: waited.append(wait(array)))
    devices = Devices.present()
    mesh = make_mesh(SINGLE | {"rows": 2}, devices.devices)
    tensors = {f"{i}.weight": torch.randn(40, 50).to(dtype) for i in range(6)}
    asked: list[tuple[str, Any]] = []

    def sharding_of(name: str, shape: Any) -> Any:
        asked.append((name, tuple(shape)))
        axes = ("rows",) if name.startswith("1") else ()
        return jax.sharding.NamedSharding(mesh, PartitionSpec(*axes))

    parameters = devices.put_weights(
        tensors.items(), sharding_of, arrange=lambda _, array: array.swapaxes(0, 1)
    )
    assert asked == [(name, (50, 40)) for name in tensors]
    for name, tensor in tensors.items():
        expected = tensor.T.contiguous().view(torch.uint8).numpy()
        np.testing.assert_array_equal(np.asarray(parameters[name]).view(np.uint8), expected)
    assert parameters["1.weight"].addressable_shards[0].data.shape == (25, 40)
    assert len(waited) == waits


def test_weights_lie_where_xla_needs_no_copy_of_its_own() -> None:
    """On CPUs an array that begins at a multiple of 64 bytes is the device's own."""
    buffer = np.arange(100 + 64, dtype=np.float32)
    lies = next(i for i in range(17) if buffer[i:].ctypes.data % CPU_ALIGNMENT == 0)
    already = buffer[lies : lies + 64].reshape(8, 8)
    assert module._aligned(already) is already
    for array in (buffer[lies + 1 : lies + 65].reshape(8, 8), already.T):
        aligned = module._aligned(array)
        assert aligned.ctypes.data % CPU_ALIGNMENT == 0 and aligned.flags.c_contiguous
        np.testing.assert_array_equal(aligned, array)


def test_the_cores_of_a_cpu_share_images_and_predictions(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that this process may use, none for rows; an asked mesh takes devices as they are."""
    devices = Devices.present()
    assert len(devices.devices) == 8 and devices.platform == "cpu"

    def choose(asked: dict[str, int] | None, images: int, predictions: int) -> str:
        return str(
            devices.choose_mesh(
                asked, images=images, predictions=predictions, rows_of_levels=[8, 4]
            )
        )

    monkeypatch.setattr(module, "usable_cores", lambda: 2)
    assert choose(None, 1, 1) == "single"
    assert choose(None, 1, 2) == "cfg=2"
    assert choose(None, 4, 2) == "data=2"
    assert choose({"rows": 4}, 1, 1) == "rows=4"
    monkeypatch.setattr(module, "usable_cores", lambda: 64)
    assert choose(None, 4, 2) == "data=4,cfg=2"


def test_facts_of_devices() -> None:
    mesh = make_mesh(SINGLE | {"cfg": 2, "rows": 2}, jax.devices())
    facts = device_facts(mesh, torch.bfloat16)
    assert facts["mesh"] == name_of(mesh) == "cfg=2,rows=2"
    assert (facts["backend"], facts["platform"], facts["devices"]) == ("jax", "cpu", 4)
    assert facts["peak_flops"] is None and facts["peak_device_bytes"] is None  # a CPU tells none
