"""The bridge from PyTorch modules to jax functions."""

import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
import torch

from common.compute import torchax_runtime
from common.models.weights import weights_of


def jax_weights(module: torch.nn.Module) -> dict[str, jax.Array]:
    return {name: jax.numpy.asarray(tensor.numpy()) for name, tensor in weights_of(module)}


class Scaled(torch.nn.Module):
    """A module with a parameter and a buffer that is not in its state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)
        self.register_buffer("offset", torch.tensor([0.5, -1.0]), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.offset

    def double(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return 2 * self.forward(x)


@pytest.mark.parametrize("method", ["forward", "double"])
def test_a_module_becomes_a_function_of_its_weights(method: str) -> None:
    torch.manual_seed(0)
    module = Scaled().requires_grad_(False)
    x = torch.randn(4, 3)
    expected = getattr(module, method)(x).numpy()
    weights = jax_weights(module)
    function = jax.jit(torchax_runtime.as_jax_function(module, method))
    np.testing.assert_allclose(function(weights, x.numpy()), expected, rtol=1e-6, atol=1e-6)
    # The weights are arguments: others give another result from the same compiled program.
    zeros = jax.tree.map(lambda weight: weight * 0, weights)
    assert not np.asarray(function(zeros, x.numpy())).any()


def test_weights_leave_the_module_and_torchax_stays_off() -> None:
    module = Scaled().requires_grad_(False)
    jax_weights(module)
    assert all(parameter.is_meta for parameter in module.parameters())
    assert isinstance(torch.ones(2) + 1, torch.Tensor)
    assert (torch.ones(2) + 1).device.type == "cpu"


def test_bfloat16_crosses_as_the_same_bits() -> None:
    tensor = torch.randn(5).to(torch.bfloat16)
    array = torchax_runtime.to_numpy(tensor)
    assert array.dtype == jax.numpy.bfloat16
    assert (array.view(np.int16) == tensor.view(torch.int16).numpy()).all()


def test_the_stand_ins_are_still_needed() -> None:
    """Fails when torchax and torch agree again: then `register_missing_overloads` can go."""
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    stand_ins = [
        name
        for name in ("dim_Dimname", "Dimname_out")
        if isinstance(getattr(torch.ops.aten.prod, name, None), tuple)
    ]
    assert bool(stand_ins) == (version >= (2, 13))


def test_two_threads_trace_at_once() -> None:
    """Each with operations of its own, for the one environment that torchax has."""
    module = Scaled().requires_grad_(False)
    x = np.ones((2, 3), np.float32)
    weights = jax_weights(module)
    both_began = threading.Barrier(2, timeout=30)

    def trace(factor: float) -> np.ndarray:
        def linear(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
            return (x @ weight.T + bias) * factor

        replacements = {torch.nn.functional.linear: linear}
        function = torchax_runtime.as_jax_function(module, replacements=replacements)
        found = []
        for _ in range(10):
            both_began.wait()
            found.append(np.asarray(jax.jit(lambda *args: function(*args))(weights, x)))
        assert all((each == found[0]).all() for each in found)
        return found[0]

    with ThreadPoolExecutor(2) as pool:
        single, double = pool.map(trace, [1.0, 2.0])
    offset = np.asarray(weights["offset"])
    np.testing.assert_allclose(double - offset, 2 * (single - offset), rtol=1e-6)


def test_a_trace_that_fails_leaves_no_operation_behind() -> None:
    module = Scaled().requires_grad_(False)
    weights = jax_weights(module)
    x = jax.numpy.ones((2, 3))
    expected = torchax_runtime.as_jax_function(module)(weights, x)

    def fail(*_: object) -> jax.Array:
        raise ArithmeticError("refused")

    replacements = {torch.nn.functional.linear: fail}
    failing = torchax_runtime.as_jax_function(module, replacements=replacements)
    with pytest.raises(ArithmeticError):
        failing(weights, x)
    np.testing.assert_array_equal(torchax_runtime.as_jax_function(module)(weights, x), expected)
    assert not module._forward_hooks and not module.linear._forward_hooks
