"""The devices that a program is compiled for: jax's own, or those of a TPU that is not there."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import torch

from common.fast_ops import arrange_weight
from common.sharding import SINGLE
from common.torchax_runtime import Parameters, parameters_of


@dataclass(frozen=True)
class Devices:
    """Devices of one platform, and how arrays get to them."""

    devices: Sequence[Any]
    are_there: bool

    @classmethod
    def present(cls) -> "Devices":
        """The devices of this process and, on several hosts, of the others."""
        return cls(jax.devices(), True)

    @classmethod
    def described(cls, devices: Sequence[Any]) -> "Devices":
        """Devices to compile for; arrays are described, not moved."""
        return cls(devices, False)

    @property
    def platform(self) -> str:
        """tpu, gpu or cpu."""
        return str(self.devices[0].platform)

    def mesh_by_default(self, asked: Mapping[str, int] | None) -> Mapping[str, int] | None:
        """The mesh that is asked for; several CPU devices are one machine's, so none is chosen."""
        return SINGLE if asked is None and self.platform == "cpu" else asked

    def put(self, tree: Any, sharding: Any) -> Any:
        """Place arrays by a sharding."""
        if self.are_there:
            return jax.device_put(tree, sharding)
        return jax.tree.map(lambda x: self.describe(x.shape, x.dtype, sharding), tree)

    @staticmethod
    def describe(shape: Sequence[int], dtype: Any, sharding: Any) -> Any:
        """An array without its data."""
        return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=sharding)

    def put_weights(
        self, module: torch.nn.Module, sharding_of: Callable[[str, Sequence[int]], Any]
    ) -> Parameters:
        """Move a module's weights to the devices, one at a time; the module is left without them.

        Args:
            sharding_of: a weight's sharding, by its name and shape.
        """

        def put(name: str, array: Any) -> Any:
            array = arrange_weight(name, array)
            return self.put(array, sharding_of(name, array.shape))

        if self.are_there:
            return parameters_of(module, put)
        return {
            name: put(name, _without_data(tensor))
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]
        }


def _without_data(tensor: torch.Tensor) -> np.ndarray:
    """An array of a tensor's shape and dtype that takes no memory."""
    dtype = jax.numpy.dtype(str(tensor.dtype).removeprefix("torch."))
    return np.broadcast_to(np.zeros((), dtype), tuple(tensor.shape))
