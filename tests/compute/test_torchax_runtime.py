"""The bridge from PyTorch modules to jax functions."""

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
