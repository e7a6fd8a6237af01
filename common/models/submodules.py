"""Submodules of a UNet whose outputs are the same in all steps, so that one result serves all."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch


def prompt_projections(unet: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """A UNet's submodules that see the prompt alone, so that one result serves all steps."""
    return {
        name: submodule
        for name, submodule in unet.named_modules()
        if name.endswith((".attn2.to_k", ".attn2.to_v"))
    }


@contextmanager
def bypassed(module: torch.nn.Module, given: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Let submodules return what is given in place of what they would compute."""
    submodules = [(module.get_submodule(name), tensor) for name, tensor in given.items()]
    for submodule, tensor in submodules:
        submodule.forward = partial(_return, tensor)
    try:
        yield
    finally:
        for submodule, _ in submodules:
            del submodule.forward


def _return(output: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return output
