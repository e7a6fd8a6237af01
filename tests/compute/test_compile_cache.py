"""The compile cache: entries that are damaged, a folder that cannot be written."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from common.compute import compile_cache
from common.compute.clock import StageReport
from common.compute.programs import compile_program


def compile_one() -> bool:
    """Compile a program. Returns whether it came from the cache."""
    jax.clear_caches()
    report = StageReport(2, since_process_began=False)
    compile_program(lambda: jax.jit(lambda x: jnp.cos(x) * 3).lower(1.0), "one", report)
    return bool(report.programs.from_cache)


@pytest.mark.parametrize(
    "damage", [lambda content: content[:100], lambda _: b"", lambda c: c[::-1]]
)
def test_an_entry_that_cannot_be_read_is_removed_and_made_anew(
    cache: Path, damage: object, capsys: pytest.CaptureFixture[str]
) -> None:
    compile_cache.use_compile_cache()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    assert not compile_one() and compile_one()
    (entry,) = cache.glob("*-cache")
    right = entry.read_bytes()
    entry.write_bytes(damage(right))  # type: ignore[operator]
    assert not compile_one()
    assert capsys.readouterr().err == (
        f"warning: {entry} is damaged: it is removed, and the program compiled anew\n"
    )
    assert len(entry.read_bytes()) > 0.9 * len(right)
    assert compile_one()


def test_a_folder_that_cannot_be_written_is_said_once(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "file" / "cache"))
    for _ in range(2):
        compile_cache.use_compile_cache()
    said = capsys.readouterr().err
    assert said.count("cannot be written") == said.count("\n") == 1
    assert "XDG_CACHE_HOME" in said


def test_a_relative_cache_home_is_ignored(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the XDG base directory specification says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    jax.config.update("jax_compilation_cache_dir", None)
    compile_cache.use_compile_cache()
    found = Path(str(jax.config.jax_compilation_cache_dir))  # type: ignore[attr-defined]
    assert found == tmp_path / "home" / ".cache" / "staged-diffusion" / "compiled"
    assert not (tmp_path / "relative").exists()
    assert os.access(found, os.W_OK)
