"""What computes here, told without importing jax."""

import os
import subprocess
import sys
from functools import cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

from common.errors import UnfitEnvironmentError, shorten

# Reads XLA_FLAGS as a program's compilation does; XLA ends the process where it cannot.
_READ_XLA_FLAGS = "from jaxlib import _jax; _jax.CompileOptions()"
_TRUE = ("1", "true", "yes", "on", "y", "t")


def has_only_cpus() -> bool:
    """Whether jax has nothing but CPUs, as far as that can be told without importing it.

    The libtpu wheel alone is no TPU: it also compiles for those that are elsewhere (`--topology`).
    """
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms == "cpu"
    if find_spec("jax_plugins") or entry_points(group="jax_plugins"):
        return False
    return not may_have_tpu()


def may_have_tpu() -> bool:
    """Whether jax may find a TPU here, whose chips one process holds."""
    if "tpu" not in (os.environ.get("JAX_PLATFORMS") or "tpu"):
        return False
    return find_spec("libtpu") is not None and has_tpu_files(Path("/dev"))


def has_tpu_files(folder: Path) -> bool:
    """Whether a system shows what may be a TPU's chips, among its devices' files."""
    return any(folder.glob("accel*")) or (folder / "vfio").exists()


def refuse_unfit_environment() -> None:
    """Raise `UnfitEnvironmentError` for a variable under which jax or XLA would not compile."""
    if os.environ.get("JAX_DISABLE_JIT", "").lower() in _TRUE:
        raise UnfitEnvironmentError(
            "JAX_DISABLE_JIT is set, and stages are compiled programs: unset it, or use --backend "
            "torch"
        )
    if flags := os.environ.get("XLA_FLAGS", "").strip():
        _refuse_xla_flags(flags)


@cache
def _refuse_xla_flags(flags: str) -> None:
    """Raise where XLA would end this process for one of its flags; tried once in a process."""
    tried = subprocess.run(
        [sys.executable, "-c", _READ_XLA_FLAGS], capture_output=True, text=True, check=False
    )
    if tried.returncode != 0:
        lines = [line.partition("] ")[2] for line in tried.stderr.splitlines() if "] " in line]
        reason = next((line for line in lines if line), "a value does not fit its flag")
        raise UnfitEnvironmentError(
            f"XLA refuses XLA_FLAGS {flags} ({shorten(reason, 200)}): "
            "take out what this jaxlib does not know; flags of the TPU's compiler go into "
            "LIBTPU_INIT_ARGS"
        )


def usable_cores() -> int:
    """The CPU cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1
