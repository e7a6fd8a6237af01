"""Prepare jax: the compile cache, the device, and counts of what was compiled."""

import os
from dataclasses import dataclass

import jax

from common.checkpoint import CACHE_DIR
from common.errors import UnfitEnvironmentError

CACHE_HIT_EVENT = "/jax/compilation_cache/cache_hits"


@dataclass
class CompileCounter:
    """Counts programs that came from the persistent compile cache."""

    cache_hits: int = 0

    def listen(self, event: str, **_: object) -> None:
        """Count one of jax's monitoring events."""
        if event == CACHE_HIT_EVENT:
            self.cache_hits += 1


def set_up_jax() -> CompileCounter:
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
    counter = CompileCounter()
    jax.monitoring.register_event_listener(counter.listen)
    try:
        jax.devices()
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UnfitEnvironmentError(
            f"jax finds no device ({reason}): free the device, or run on the CPU with "
            "JAX_PLATFORMS=cpu"
        ) from None
    return counter


def platform() -> str:
    """The platform of the devices in use: cpu, gpu or tpu."""
    return str(jax.default_backend())


def choose_dtype(asked: str, *, force_float32: bool = False) -> str:
    """Settle `auto`: float32 on CPU and where the model asks for it, else bfloat16."""
    if asked != "auto":
        return asked
    return "float32" if force_float32 or platform() == "cpu" else "bfloat16"
