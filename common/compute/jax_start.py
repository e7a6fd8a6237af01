"""Start jax, once in a process: its compile cache, its devices, the processes that share them."""

import os
import re
import shlex
from contextlib import suppress

import jax
import psutil

from common.compute.compile_cache import use_compile_cache
from common.compute.own_chips import parse_chips
from common.compute.platforms import has_only_cpus, usable_cores
from common.compute.processes import join_processes
from common.errors import BadSettingError, UnfitEnvironmentError, in_one_line, shorten
from common.models.model_settings import PROJECT_DIR

# jax's devices are those that it started with, alone or with other processes: for good.
_has_started = False
_joined: str | None = None  # `--distributed`, once the others are found


def set_up_jax(distributed: str | None = None) -> None:
    """Turn on the persistent compile cache, readable by its owner only, and find the devices.

    A cache that jax's own settings name is used, unless others can write to it. Every core of a CPU
    becomes a device of its own, unless those settings say otherwise. Once jax has started this
    changes nothing.

    Args:
        distributed: as `join_processes` takes it; None for a process alone.

    Raises:
        BadSettingError: jax has started with other processes, or without.
        UnfitEnvironmentError: jax finds no device.
    """
    global _has_started, _joined
    use_compile_cache()
    if distributed != _joined and (_has_started or _joined is not None):
        asked = "no --distributed" if distributed is None else f"--distributed {distributed}"
        began = "alone" if _joined is None else f"with --distributed {_joined}"
        raise BadSettingError(
            f"{asked}: jax started {began} in this process, and stays so: run it in another one"
        )
    if _has_started:
        return
    _choose_devices()
    if distributed is not None and _joined is None:
        join_processes(distributed)
        _joined = distributed
    find_devices()
    _has_started = True


def _choose_devices() -> None:
    asked = jax.config.jax_num_cpu_devices >= 0  # type: ignore[attr-defined]
    if not asked and "device_count" not in os.environ.get("XLA_FLAGS", ""):
        with suppress(RuntimeError):  # whoever holds this process has used jax before
            jax.config.update("jax_num_cpu_devices", usable_cores())
    if jax.config.jax_hlo_source_file_canonicalization_regex is None:  # type: ignore[attr-defined]
        # A kernel for TPUs holds the places of its code, and the compile cache's key the kernel:
        # without this a checkout or an environment in another folder compiles all anew.
        jax.config.update(
            "jax_hlo_source_file_canonicalization_regex",
            f"^.*/site-packages/|^{re.escape(str(PROJECT_DIR))}/",
        )
    if has_only_cpus():
        # libtpu would look for chips, and complain at length that there are none.
        jax.config.update("jax_platforms", "cpu")


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


def refuse_other_chips(text: str) -> None:
    """Raise `BadSettingError` where jax has not started on the chips that were taken for it.

    Args:
        text: as `own_chips.take_chips` takes it.
    """
    count, devices = len(parse_chips(text)), jax.devices()
    on_cores = devices[0].platform == "cpu"  # each of which may be several devices
    there = usable_cores() if on_cores else len(devices)
    if there < count or (on_cores and there > count):
        raise BadSettingError(
            f"--chips {text} are {count}, and jax sees {there} of {devices[0].device_kind}: give "
            "numbers of chips that are there"
        )


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


def platform() -> str:
    """The platform of the devices in use: cpu, gpu or tpu."""
    return str(jax.default_backend())
