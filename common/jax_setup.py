"""Prepare jax: the compile cache, the device, and counts of what was compiled."""

import os
from dataclasses import dataclass
from typing import Any

import jax

from common.checkpoint import CACHE_DIR
from common.errors import UnfitEnvironmentError, in_one_line

CACHE_HIT_EVENT = "/jax/compilation_cache/cache_hits"


_cache_hits = 0


def _count_cache_hits(event: str, **_: object) -> None:
    global _cache_hits
    _cache_hits += event == CACHE_HIT_EVENT


jax.monitoring.register_event_listener(_count_cache_hits)


@dataclass
class Programs:
    """Compiles programs, and counts those that came from the persistent compile cache."""

    compiled: int = 0
    from_cache: int = 0

    def compile(self, lowered: Any) -> Any:
        """Compile a lowered program."""
        before = _cache_hits
        program = lowered.compile()
        if _cache_hits > before:
            self.from_cache += 1
        else:
            self.compiled += 1
        return program


def set_up_jax() -> None:
    """Turn on the persistent compile cache, readable by its owner only, and find the devices.

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
    try:
        jax.devices()
    except RuntimeError as error:
        reason = in_one_line(error)
        raise UnfitEnvironmentError(
            f"jax finds no device ({reason}): free the device, or run on the CPU with "
            "JAX_PLATFORMS=cpu"
        ) from None


def platform() -> str:
    """The platform of the devices in use: cpu, gpu or tpu."""
    return str(jax.default_backend())


def choose_dtype(asked: str, *, force_float32: bool = False) -> str:
    """Settle `auto`: float32 on CPU and where the model asks for it, else bfloat16."""
    if asked != "auto":
        return asked
    return "float32" if force_float32 or platform() == "cpu" else "bfloat16"
