"""The only module that touches torchax: PyTorch modules become pure jax functions here.

torchax is never enabled globally. A module's forward runs under torchax's environment only while
jax traces it; weights are arguments of the traced function, never constants inside it.
"""

import re
import warnings
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from jax import Array


def register_missing_overloads() -> list[str]:
    """Give torchax stand-ins for the aten overloads it names but this torch no longer has.

    torchax 0.0.13 names overloads for named tensors (`all.dimname`, …) when it is imported; torch
    2.13 removed them. No tensor ever reaches a stand-in. Returns what was missing: an empty list
    means that this function is no longer needed.
    """
    spec = find_spec("torchax")
    if spec is None or spec.origin is None:
        raise ImportError("torchax is not installed: pip install -e .")
    missing = []
    for source in sorted(Path(spec.origin).parent.rglob("*.py")):
        for name, overload in re.findall(r"torch\.ops\.aten\.(\w+)\.(\w+)", source.read_text()):
            packet = getattr(torch.ops.aten, name, None)
            if packet is not None and not hasattr(packet, overload):
                setattr(packet, overload, ("removed from torch", name, overload))
                missing.append(f"{name}.{overload}")
    return missing


register_missing_overloads()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torchax
    from torchax import interop

Parameters = dict[str, Array]


def as_jax_function(module: torch.nn.Module, method: str = "forward") -> Callable[..., Any]:
    """Make `f(parameters, *args, **kwargs)` of a module's method, traceable by `jax.jit`.

    `parameters` are the module's parameters and buffers by their state-dict names; tensors in the
    arguments and in the result are jax arrays.
    """
    environment = torchax.default_env()
    callable_module = _MethodAsForward(module, method)

    def function(parameters: Mapping[str, Array], *args: Any, **kwargs: Any) -> Any:
        with environment:
            weights, args, kwargs = interop.torch_view((dict(parameters), args, kwargs))
            result = torch.func.functional_call(
                callable_module,
                {f"module.{name}": weight for name, weight in weights.items()},
                args,
                kwargs,
            )
            return interop.jax_view(result)

    return function


class _MethodAsForward(torch.nn.Module):
    """`functional_call` calls forward; this lets it call another method."""

    def __init__(self, module: torch.nn.Module, method: str) -> None:
        super().__init__()
        self.module = module
        self.method = method

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.module, self.method)(*args, **kwargs)


def parameters_of(
    module: torch.nn.Module, put: Callable[[np.ndarray], Array] = jax.numpy.asarray
) -> Parameters:
    """Copy a module's parameters and buffers to the device, one at a time, keeping their dtypes.

    `put` places one numpy array on the device or devices. The module itself is left without data
    (on torch's meta device), so that host memory holds the weights only once.
    """
    parameters = {}
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        parameters[name] = put(to_numpy(tensor))
    module.to("meta")
    return parameters


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A torch tensor's values as numpy, bfloat16 as jax's own bfloat16 without a detour."""
    tensor = tensor.detach().contiguous().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(jax.numpy.bfloat16)
    return tensor.numpy()
