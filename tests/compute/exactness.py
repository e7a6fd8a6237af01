"""How exact an operation is: beside float64 and torchax's default operation."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from common.compute.torchax_runtime import as_jax_function

GENERATOR = torch.Generator().manual_seed(3)


def random(*shape: int, mean: float = 0.0) -> torch.Tensor:
    return torch.randn(shape, generator=GENERATOR) + mean


def error(actual: Any, exact: torch.Tensor) -> float:
    return float((torch.as_tensor(np.array(actual, np.float64)) - exact).norm() / exact.norm())


class Call(torch.nn.Module):
    """A torch function as a module, for torchax."""

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *arguments: torch.Tensor) -> torch.Tensor:
        return self.function(*arguments)


def by_torchax(function: Callable[..., torch.Tensor], *arguments: torch.Tensor) -> np.ndarray:
    """torchax's default operation in bfloat16."""
    arrays = [jnp.asarray(argument.numpy(), jnp.bfloat16) for argument in arguments]
    return np.asarray(jax.jit(as_jax_function(Call(function)))({}, *arrays), np.float64)
