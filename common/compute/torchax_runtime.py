"""The only module that touches torchax: PyTorch modules become pure jax functions here.

torchax is never enabled globally. A module's forward runs under torchax's environment only while
jax traces it; weights are arguments of the traced function, never constants inside it.
"""

import re
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from jax import Array

from common.models.submodules import bypassed


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

# A trace changes torchax's only environment and the module that is traced. A thread may trace one
# module within another.
_traces = threading.RLock()


def as_jax_function(
    module: torch.nn.Module,
    method: str | Callable[..., Any] = "forward",
    *,
    replacements: Mapping[Callable[..., Any], Callable[..., Array]] | None = None,
    finish: Callable[[str, torch.nn.Module, Array], Array] | None = None,
) -> Callable[..., Any]:
    """Make `f(parameters, *args, given=None, **kwargs)` of a module's method, for `jax.jit`.

    `parameters` are the module's parameters and buffers by their state-dict names; tensors in the
    arguments and in the result are jax arrays. The compiled program's operations carry the names of
    the submodules that they come from.

    Args:
        method: its name, or a function that is given the module.
        replacements: torch's functions, and jax functions that stand in for them.
        finish: is given each submodule's name, itself and its output where that is one tensor;
            returns the output, with a sharding for example.

    The function's `given` are outputs of submodules by their names, which are then not computed.
    """
    callable_module = _MethodAsForward(module, method)

    def function(
        parameters: Mapping[str, Array],
        *args: Any,
        given: Mapping[str, Array] | None = None,
        **kwargs: Any,
    ) -> Any:
        with (
            _traces,
            torchax.default_env() as environment,  # making it takes time the first time
            _replaced(environment, replacements or {}),
            _watched(module, finish),
            bypassed(module, interop.torch_view(dict(given or {}))),
        ):
            weights, args, kwargs = interop.torch_view((dict(parameters), args, kwargs))
            result = torch.func.functional_call(
                callable_module,
                {f"module.{name}": weight for name, weight in weights.items()},
                args,
                kwargs,
            )
            return interop.jax_view(result)

    return function


@contextmanager
def _replaced(
    environment: Any, replacements: Mapping[Callable[..., Any], Callable[..., Array]]
) -> Iterator[None]:
    """Override torchax's operations for the time of a trace."""
    before = {operation: environment._ops.get(operation) for operation in replacements}
    try:
        for operation, function in replacements.items():
            environment.override_op_definition(operation, _of_torch_tensors(environment, function))
        yield
    finally:
        for operation, definition in before.items():
            if definition is None:
                environment._ops.pop(operation, None)
            else:
                environment._ops[operation] = definition


def _of_torch_tensors(environment: Any, function: Callable[..., Array]) -> Callable[..., Any]:
    def operation(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = environment.t2j_iso((args, kwargs))
        return environment.j2t_iso(function(*args, **kwargs))

    return operation


@contextmanager
def _watched(
    module: torch.nn.Module, finish: Callable[[str, torch.nn.Module, Array], Array] | None
) -> Iterator[None]:
    """Name operations after their submodules, and hand each submodule's output to `finish`."""
    scopes: list[Any] = []

    def enter(name: str, *_: Any) -> None:
        scopes.append(jax.named_scope(name))
        scopes[-1].__enter__()

    def leave(name: str, submodule: torch.nn.Module, _: Any, output: Any) -> Any:
        scopes.pop().__exit__(None, None, None)
        if finish is None or not isinstance(output, torch.Tensor):
            return output
        return interop.torch_view(finish(name, submodule, interop.jax_view(output)))

    hooks = []
    for name, submodule in module.named_modules():
        if name:
            last = name.rsplit(".", 1)[-1]
            # A numbered submodule is named with its list: "resnets.0".
            label = ".".join(name.split(".")[-2:]) if last.isdigit() else last
            hooks.append(submodule.register_forward_pre_hook(partial(enter, label)))
            hooks.append(submodule.register_forward_hook(partial(leave, name)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _MethodAsForward(torch.nn.Module):
    """`functional_call` calls forward; this lets it call another method, or a function."""

    def __init__(self, module: torch.nn.Module, method: str | Callable[..., Any]) -> None:
        super().__init__()
        self.module = module
        self.method = method

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if callable(self.method):
            return self.method(self.module, *args, **kwargs)
        return getattr(self.module, self.method)(*args, **kwargs)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A torch tensor's values as numpy, bfloat16 as jax's own bfloat16 without a detour."""
    tensor = tensor.detach().contiguous().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(jax.numpy.bfloat16)
    return tensor.numpy()
