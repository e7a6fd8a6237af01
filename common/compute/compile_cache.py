"""jax's persistent compile cache: where it is, and entries that cannot be read."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
from jax._src import compilation_cache

from common import private_cache
from common.messages import warn

_warned: set[str] = set()


def use_compile_cache() -> None:
    """Turn on jax's persistent compile cache.

    One that jax's own settings name is used, unless others can write to it.

    Raises:
        UnfitEnvironmentError: others can write to its folder, and so give us code to run.
    """
    named = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if named is None:
        folder = private_cache.folder() / "compiled"
        private_cache.make_private(folder)
        if folder.is_dir():
            jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
    else:
        folder = Path(named)
        if folder.is_dir():
            private_cache.refuse_if_others_write(folder)
    _warn_if_not_writable(folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    compilation_cache.get_executable_and_time = _read_or_remove


def _warn_if_not_writable(folder: Path) -> None:
    """Say once that programs are compiled in every process."""
    there = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    fits = there.is_dir() and os.access(there, os.W_OK)
    if not fits and str(folder) not in _warned:
        _warned.add(str(folder))
        warn(
            f"the compile cache {folder} cannot be written, so that programs are compiled in every "
            "process: set XDG_CACHE_HOME to another folder, or free it"
        )


_read = compilation_cache.get_executable_and_time


def _read_or_remove(
    cache_key: str, compile_options: Any, backend: Any, executable_devices: Any
) -> tuple[Any | None, int | None]:
    """jax's own reading of an entry; one that cannot be read is removed, and so made anew.

    jax writes entries in place and never replaces one: an entry that was cut short, by a full disk
    or a kill, would be in the way for good.
    """
    try:
        return _read(cache_key, compile_options, backend, executable_devices)
    except Exception:
        folder = Path(str(jax.config.jax_compilation_cache_dir))  # type: ignore[attr-defined]
        entry = folder / f"{cache_key}-cache"
        with suppress(OSError):
            entry.unlink()
        warn(f"{entry} is damaged: it is removed, and the program compiled anew")
        return None, None
