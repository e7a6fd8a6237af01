"""The devices that a program is compiled for: jax's own, or those of a TPU that is not there."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import torch
from jax.experimental import multihost_utils

from common.compute.chips import PEAK_BFLOAT16
from common.compute.platforms import usable_cores
from common.compute.sharding import MeshChoice, choose_mesh, name_of
from common.compute.torchax_runtime import Parameters, to_numpy

CPU_ALIGNMENT = 64  # bytes

MOST_UNDER_WAY = 256 * 2**20  # bytes of weights that the host holds until they are on the devices


@dataclass(frozen=True)
class Devices:
    """Devices of one platform, and how arrays get to them."""

    devices: Sequence[Any]
    are_there: bool
    memory_bytes: int | None = None  # of each; None where it is not known, as on CPUs

    @classmethod
    def present(cls) -> "Devices":
        """The devices of this process and, on several hosts, of the others."""
        memory = jax.local_devices()[0].memory_stats() or {}
        return cls(jax.devices(), True, memory.get("bytes_limit"))

    @classmethod
    def described(cls, devices: Sequence[Any], memory_bytes: int) -> "Devices":
        """Devices to compile for; arrays are described, not moved."""
        return cls(devices, False, memory_bytes)

    @property
    def platform(self) -> str:
        """tpu, gpu or cpu."""
        return str(self.devices[0].platform)

    def choose_mesh(
        self,
        asked: Mapping[str, int] | None,
        *,
        images: int,
        predictions: int,
        rows_of_levels: Sequence[int],
    ) -> MeshChoice:
        """Settle the mesh by `sharding.choose_mesh`.

        Unless asked, a CPU's cores share images and predictions, never rows.
        """
        on_cores = asked is None and self.platform == "cpu"
        count = len(self.devices)
        return choose_mesh(
            asked,
            devices=min(count, usable_cores()) if on_cores else count,
            images=images,
            predictions=predictions,
            rows_of_levels=rows_of_levels,
            split_rows=not on_cores,
        )

    def put(self, tree: Any, sharding: Any) -> Any:
        """Place arrays by a sharding; on several hosts each places its own part."""
        if not self.are_there:
            return jax.tree.map(lambda x: self.describe(x.shape, x.dtype, sharding), tree)
        if sharding.is_fully_addressable:
            return jax.device_put(tree, sharding)
        return jax.tree.map(
            lambda x: jax.make_array_from_callback(
                np.shape(x), sharding, lambda index: np.asarray(x)[index]
            ),
            tree,
        )

    @staticmethod
    def describe(shape: Sequence[int], dtype: Any, sharding: Any) -> Any:
        """An array without its data."""
        return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=sharding)

    def put_weights(
        self,
        weights: Iterable[tuple[str, torch.Tensor]],
        sharding_of: Callable[[str, Sequence[int]], Any],
        *,
        arrange: Callable[[str, np.ndarray], np.ndarray],
    ) -> Parameters:
        """Move a model's weights to the devices, one at a time, keeping their dtypes.

        The devices of a CPU share one copy of those that are not split.

        Args:
            weights: names and tensors; on torch's meta device for devices that are not there.
            sharding_of: a weight's sharding, by its name and shape.
            arrange: lays a weight out as the programs want it.
        """
        parameters: Parameters = {}
        under_way = 0
        for name, tensor in weights:
            array = to_numpy(tensor) if self.are_there else _without_data(tensor)
            array = arrange(name, array)
            if self.are_there and self.platform == "cpu":
                array = _aligned(array)
            parameters[name] = self.put(array, sharding_of(name, array.shape))
            under_way += array.nbytes
            if self.are_there and under_way > MOST_UNDER_WAY:
                jax.block_until_ready(parameters[name])
                under_way = 0
        return parameters


@dataclass(frozen=True, kw_only=True)
class ModelOnDevices:
    """A model whose weights are on the devices of a mesh."""

    module: Any  # diffusers' own, for its code
    parameters: Parameters
    mesh: jax.sharding.Mesh
    devices: Devices  # those of the mesh; for ones that are not there, programs can only be lowered
    operations: str  # fast or torchax


def device_facts(mesh: jax.sharding.Mesh, dtype: torch.dtype) -> dict[str, Any]:
    """What a stage reports of its devices, with their peak where it is known for the dtype."""
    devices = list(mesh.devices.flat)
    kind = devices[0].device_kind
    stats = [device.memory_stats() or {} for device in mesh.local_devices]
    peaks = [found["peak_bytes_in_use"] for found in stats if "peak_bytes_in_use" in found]
    peak_flops = PEAK_BFLOAT16.get(kind) if dtype == torch.bfloat16 else None
    return {
        "backend": "jax",
        "platform": devices[0].platform,
        "device": kind,
        "devices": len(devices),
        "mesh": name_of(mesh),
        "peak_device_bytes": max(peaks, default=None),
        "peak_flops": None if peak_flops is None else peak_flops * len(devices),
    }


def fetch(array: jax.Array) -> np.ndarray:
    """An array's values on the host; on several hosts all get all of them."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def _aligned(array: np.ndarray) -> np.ndarray:
    """The same values where XLA on CPUs needs no copy of its own: in order, from a multiple of 64.

    A copy is made only where they do not lie so.
    """
    if array.flags.c_contiguous and array.ctypes.data % CPU_ALIGNMENT == 0:
        return array
    buffer = np.empty(array.nbytes + CPU_ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % CPU_ALIGNMENT
    aligned = buffer[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    aligned[...] = array
    return aligned


def _without_data(tensor: torch.Tensor) -> np.ndarray:
    """An array of a tensor's shape and dtype that takes no memory."""
    dtype = jax.numpy.dtype(str(tensor.dtype).removeprefix("torch."))
    return np.broadcast_to(np.zeros((), dtype), tuple(tensor.shape))
