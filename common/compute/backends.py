"""The backend that a stage computes with: jax's compiled programs, or PyTorch on the CPU."""

import os
from dataclasses import dataclass
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common.compute.allocator import keep_freed_memory
from common.errors import BadSettingError
from common.runs.generation import RunOptions

# What a stage reports of where PyTorch computes.
TORCH_FACTS: dict[str, Any] = {"backend": "torch", "platform": "cpu", "device": "cpu", "devices": 1}
ONLY_JAX = ("mesh", "steps_per_call", "operations", "distributed")


@dataclass(frozen=True)
class Backend:
    """A backend that is started."""

    name: str  # jax or torch
    platform: str  # of its devices: cpu, gpu or tpu
    is_first_process: bool = True  # which writes; of several that compute together

    def choose_dtype(self, asked: str, *, force_float32: bool = False) -> str:
        """Settle `auto`: float32 on CPU and where the model asks for it, else bfloat16."""
        if asked != "auto":
            return asked
        return "float32" if force_float32 or self.platform == "cpu" else "bfloat16"


def start_backend(options: RunOptions, *, torch_on_cpus: bool) -> Backend:
    """Start the backend that is asked for.

    Args:
        torch_on_cpus: what `auto` is where jax has nothing but CPUs: PyTorch, or jax there too.

    Raises:
        UnfitEnvironmentError: jax finds no device.
    """
    if options.backend == "torch":
        return _start_torch()
    may_be_torch = torch_on_cpus and options.backend == "auto" and not asked_of_jax(options)
    if may_be_torch and has_only_cpus():
        return _start_torch()  # without importing jax
    from common.compute import jax_start

    jax_start.set_up_jax(options.distributed)
    if may_be_torch and jax_start.platform() == "cpu":
        return _start_torch()
    return Backend("jax", jax_start.platform(), jax_start.is_first_process())


def _start_torch() -> Backend:
    keep_freed_memory()
    return Backend("torch", "cpu")


def refuse_unknown_to_torch(options: RunOptions) -> None:
    """Raise `BadSettingError` for flags of the compiled program beside `--backend torch`."""
    if options.backend == "torch" and (asked := asked_of_jax(options)):
        raise BadSettingError(
            f"--{asked[0]} is for the compiled program: leave it or --backend torch out"
        )


def asked_of_jax(options: RunOptions) -> list[str]:
    """The options asked for that PyTorch does not know."""
    return [name for name in options.given() if name in ONLY_JAX]


def has_only_cpus() -> bool:
    """Whether jax has nothing but CPUs, as far as that can be told without importing it.

    The libtpu wheel alone is no TPU: it also compiles for those that are elsewhere (`--topology`).
    """
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms == "cpu"
    if find_spec("jax_plugins") or entry_points(group="jax_plugins"):
        return False
    return find_spec("libtpu") is None or not has_tpu_files(Path("/dev"))


def has_tpu_files(folder: Path) -> bool:
    """Whether a system shows what may be a TPU's chips, among its devices' files."""
    return any(folder.glob("accel*")) or (folder / "vfio").exists()
