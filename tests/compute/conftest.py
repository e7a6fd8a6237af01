"""What tests of compiled programs share."""

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jax._src import compilation_cache


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Path]:
    """A persistent compile cache of a test's own, which takes every program."""
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    names = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in names}
    read = compilation_cache.get_executable_and_time
    for name, value in names.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield folder
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.get_executable_and_time = read
    compilation_cache.reset_cache()
