"""Prepare jax: the compile cache, the device, and counts of what was compiled."""

import os
import re
import shlex
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import psutil

from common import private_cache
from common.compute.backends import has_only_cpus
from common.errors import BadSettingError, UnfitEnvironmentError, in_one_line, shorten
from common.files.report import Program, StageReport

SECONDS_TO_MEET = 300.0  # as long as jax waits
MOST_PORT = 65_535
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

    A cache that jax's own settings name is used, unless others can write to it. Every core of a CPU
    becomes a device of its own, unless those settings say otherwise.

    Args:
        distributed: as `join_processes` takes it; None for a process alone.

    Raises:
        UnfitEnvironmentError: jax finds no device.
    """
    use_compile_cache()
    asked = jax.config.jax_num_cpu_devices >= 0  # type: ignore[attr-defined]
    if not asked and "device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", usable_cores())
    if has_only_cpus():
        # libtpu would look for chips, and complain at length that there are none.
        jax.config.update("jax_platforms", "cpu")
    if distributed is not None:
        join_processes(distributed)
    find_devices()


def find_devices() -> None:
    """Let jax start its platform.

    Raises:
        UnfitEnvironmentError: it has no device, or another process holds it; names that.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter without jax's plugin for it
        reason = in_one_line(error) or f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS')}"
        raise UnfitEnvironmentError(
            f"jax finds no device ({reason}{_name_holder(reason)}): free the device, install jax "
            "for it, or run on the CPU with JAX_PLATFORMS=cpu"
        ) from None


def use_compile_cache() -> None:
    """Turn on jax's persistent compile cache.

    Raises:
        UnfitEnvironmentError: others can write to its folder, and so give us code to run.
    """
    named = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if named is None:
        folder = private_cache.folder() / "compiled"
        private_cache.make_private(folder)
        if not folder.is_dir():
            return  # without a cache every run compiles
        jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
    elif Path(named).is_dir():
        private_cache.refuse_if_others_write(Path(named))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _name_holder(message: str) -> str:
    """The command of the process that libtpu says holds the TPU, as an addition to its message."""
    match = re.search(r"already in use by process with pid (\d+)", message)
    if match is None:
        return ""
    try:
        command = shlex.join(psutil.Process(int(match[1])).cmdline())
        return f", which runs {shorten(command, 200)}"
    except (psutil.Error, OSError):
        return ""


def join_processes(distributed: str) -> None:
    """Make this process one of several that compute together.

    Args:
        distributed: `auto` on a TPU slice, whose hosts find each other; else the first process's
            address, the number of processes and this one's index, HOST:PORT,COUNT,INDEX.

    Raises:
        BadSettingError: not of that form.
        UnfitEnvironmentError: the processes do not find each other.
    """
    match = re.fullmatch(r"(.+:(\d{1,5})),([1-9]\d{0,5}),(\d{1,6})", distributed)
    if distributed != "auto" and (
        match is None or int(match[2]) > MOST_PORT or int(match[4]) >= int(match[3])
    ):
        raise BadSettingError(
            f"--distributed {distributed} is not understood: give auto on a TPU slice, else "
            "HOST:PORT,COUNT,INDEX with an index from 0"
        )
    found: dict[str, Any] = {}
    if match is not None:
        meet_at(match[1], is_first=int(match[4]) == 0)
        found = {
            "coordinator_address": match[1],
            "num_processes": int(match[3]),
            "process_id": int(match[4]),
        }
    try:
        jax.distributed.initialize(**found)
    except (RuntimeError, ValueError) as error:
        raise UnfitEnvironmentError(
            f"--distributed {distributed}: the processes do not find each other "
            f"({in_one_line(error)}): start all of them, or name the first one's address as "
            "HOST:PORT,COUNT,INDEX"
        ) from None


def meet_at(address: str, *, is_first: bool, patience: float = SECONDS_TO_MEET) -> None:
    """Wait until the first process can be reached; for that one, see that its port is free.

    jax itself would end this process without a word after minutes.

    Args:
        patience: seconds.

    Raises:
        UnfitEnvironmentError: the address is of no use; names it.
    """
    host, _, port = address.rpartition(":")
    said = f"--distributed: {address}"
    until = time.monotonic() + patience
    while True:
        try:
            if is_first:
                with socket.create_server(("", int(port))):
                    return
            with socket.create_connection((host.strip("[]"), int(port)), timeout=5):
                return
        except OSError as error:
            if is_first or not isinstance(error, ConnectionRefusedError | TimeoutError):
                raise UnfitEnvironmentError(
                    f"{said} cannot be used ({in_one_line(error)}): name a free port of the first "
                    "process's host, as HOST:PORT,COUNT,INDEX"
                ) from None
            if time.monotonic() > until:
                raise UnfitEnvironmentError(
                    f"{said} does not answer: start the first process, or name its address as "
                    "HOST:PORT,COUNT,INDEX"
                ) from None
        time.sleep(0.5)


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
