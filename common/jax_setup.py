"""Prepare jax: the compile cache, the device, and counts of what was compiled."""

import os
import re
import time
from dataclasses import dataclass
from typing import Any

import jax

from common.checkpoint import CACHE_DIR
from common.errors import BadSettingError, UnfitEnvironmentError, in_one_line
from common.report import Program, StageReport

CACHE_HIT_EVENT = "/jax/compilation_cache/cache_hits"


_cache_hits = 0


def _count_cache_hits(event: str, **_: object) -> None:
    global _cache_hits
    _cache_hits += event == CACHE_HIT_EVENT


jax.monitoring.register_event_listener(_count_cache_hits)


@dataclass(frozen=True)
class CompiledProgram:
    """A compiled program to call."""

    executable: Any
    flops: float | None  # of one call on one device, by XLA's count

    def __call__(self, *arguments: Any) -> Any:
        return self.executable(*arguments)


def compile_program(lowered: Any, name: str, report: StageReport) -> CompiledProgram:
    """Compile a lowered program, and report whether it came from the persistent cache."""
    began, before = time.perf_counter(), _cache_hits
    with report.part("compile"):
        executable = lowered.compile()
        analysis = executable.cost_analysis()
        program = CompiledProgram(executable, analysis.get("flops") if analysis else None)
    from_cache = _cache_hits > before
    report.programs.from_cache += from_cache
    report.programs.compiled += not from_cache
    report.programs.each.append(
        Program(
            name=name,
            seconds=round(time.perf_counter() - began, 4),
            from_cache=from_cache,
            flops=program.flops,
        )
    )
    return program


def set_up_jax(distributed: str | None = None) -> None:
    """Turn on the persistent compile cache, readable by its owner only, and find the devices.

    Every core of a CPU becomes a device of its own, unless jax's own settings say otherwise.

    Args:
        distributed: as `join_processes` takes it; None for a process alone.

    Raises:
        UnfitEnvironmentError: jax finds no device.
    """
    cache_dir = CACHE_DIR / "compiled"
    try:
        cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", os.fspath(cache_dir))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    except OSError:
        pass  # without a cache every run compiles
    asked = jax.config.jax_num_cpu_devices >= 0  # type: ignore[attr-defined]
    if not asked and "device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", usable_cores())
    if distributed is not None:
        join_processes(distributed)
    try:
        jax.devices()
    except RuntimeError as error:
        reason = in_one_line(error)
        raise UnfitEnvironmentError(
            f"jax finds no device ({reason}): free the device, or run on the CPU with "
            "JAX_PLATFORMS=cpu"
        ) from None


def join_processes(distributed: str) -> None:
    """Make this process one of several that compute together.

    Args:
        distributed: `auto` on a TPU slice, whose hosts find each other; else the first process's
            address, the number of processes and this one's index, HOST:PORT,COUNT,INDEX.

    Raises:
        BadSettingError: not of that form.
        UnfitEnvironmentError: the processes do not find each other.
    """
    match = re.fullmatch(r"(.+:\d+),([1-9]\d*),(\d+)", distributed)
    if distributed != "auto" and (match is None or int(match[3]) >= int(match[2])):
        raise BadSettingError(
            f"--distributed {distributed} is not understood: give auto on a TPU slice, else "
            "HOST:PORT,COUNT,INDEX with an index from 0"
        )
    found: dict[str, Any] = {}
    if match is not None:
        found = {
            "coordinator_address": match[1],
            "num_processes": int(match[2]),
            "process_id": int(match[3]),
        }
    try:
        jax.distributed.initialize(**found)
    except (RuntimeError, ValueError) as error:
        raise UnfitEnvironmentError(
            f"--distributed {distributed}: the processes do not find each other "
            f"({in_one_line(error)}): start all of them, or name the first one's address as "
            "HOST:PORT,COUNT,INDEX"
        ) from None


def is_first_process() -> bool:
    """Whether this is the process that writes: the only one, or the first of several."""
    return bool(jax.process_index() == 0)


def usable_cores() -> int:
    """The CPU cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def platform() -> str:
    """The platform of the devices in use: cpu, gpu or tpu."""
    return str(jax.default_backend())


def choose_dtype(asked: str, *, force_float32: bool = False) -> str:
    """Settle `auto`: float32 on CPU and where the model asks for it, else bfloat16."""
    if asked != "auto":
        return asked
    return "float32" if force_float32 or platform() == "cpu" else "bfloat16"
