"""What computes here, told without importing jax."""

import os
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path


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


def usable_cores() -> int:
    """The CPU cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1
