"""The cache folder: the user's own, made so, and refused where others can write to it."""

import os
import stat
from pathlib import Path

import jax
import pytest

from common import private_cache
from common.compute import jax_start
from common.errors import UnfitEnvironmentError
from common.models.checkpoint import hash_large_file


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place for caches under a umask that lets a group write, as many systems have it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = os.umask(0o002)
    yield tmp_path / "cache" / private_cache.NAME  # type: ignore[misc]
    os.umask(before)


def test_the_folder_is_made_for_its_owner_alone(cache: Path) -> None:
    assert private_cache.folder() == cache
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o770, 0o777, 0o702])
def test_a_folder_that_others_can_write_is_refused(cache: Path, tmp_path: Path, mode: int) -> None:
    private_cache.folder().chmod(mode)
    weights = tmp_path / "weights"
    weights.write_bytes(b"content")
    # A forged memory of hashes would make other weights pass for these.
    for use in (private_cache.folder, lambda: hash_large_file(weights)):
        with pytest.raises(UnfitEnvironmentError, match=r"can be written by others.*chmod go-w"):
            use()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_another_users_folder_is_refused(cache: Path) -> None:
    os.chown(private_cache.folder(), 1234, 1234)
    with pytest.raises(UnfitEnvironmentError, match="belongs to another user"):
        private_cache.folder()


def test_compiled_programs_are_kept_in_it_or_where_jax_is_told_to(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        jax_start.use_compile_cache()
        compiled = cache / "compiled"
        assert jax.config.jax_compilation_cache_dir == str(compiled)
        assert stat.S_IMODE(compiled.stat().st_mode) == 0o700

        jax.config.update("jax_compilation_cache_dir", None)
        compiled.chmod(0o777)
        with pytest.raises(UnfitEnvironmentError, match=str(compiled)):
            jax_start.use_compile_cache()

        named = tmp_path / "named"
        named.mkdir(mode=0o755)
        jax.config.update("jax_compilation_cache_dir", str(named))
        jax_start.use_compile_cache()
        assert jax.config.jax_compilation_cache_dir == str(named)
        named.chmod(0o777)
        with pytest.raises(UnfitEnvironmentError, match="can be written by others"):
            jax_start.use_compile_cache()
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_a_place_that_cannot_be_written_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    weights = tmp_path / "weights"
    weights.write_bytes(b"content")
    assert hash_large_file(weights)
