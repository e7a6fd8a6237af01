"""What tracing gave is read by a later process, gives the same bits, and is stale by all of it."""

import base64
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding, PartitionSpec

from common.compute import jax_start, program_store
from common.compute.attention import attention
from common.compute.clock import StageReport
from common.compute.program_store import ToCompile, lower_stored, store_folder
from common.compute.programs import compile_program
from common.compute.sharding import SINGLE, make_mesh
from common.errors import UnfitEnvironmentError
from tests.refusals import refusal

MODULE = torch.nn.Linear(2, 2)
X = np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8)


class Counted:
    """A function that tells how often it was traced."""

    def __init__(self) -> None:
        self.traces = 0

    def __call__(self, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        self.traces += 1
        with jax.named_scope("mid_block"):
            return jnp.sin(x) @ y, x + y


@pytest.fixture(autouse=True)
def files_are_not_newer_than_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program_store, "_PROCESS_BEGAN", float("inf"))


def compiled(
    function: Any,
    traced_in: Any = "key",
    arguments: tuple[Any, ...] = (X, X),
    module: torch.nn.Module = MODULE,
    **more: Any,
) -> tuple[Any, StageReport]:
    """As a later process would have it: in this one nothing is known."""
    jax.clear_caches()
    program_store._facts.cache_clear()
    program_store._hash_of.cache_clear()
    report = StageReport(2, since_process_began=False)
    program = ToCompile(name="two_products", function=function, arguments=arguments, **more)

    def lower() -> Any:
        return lower_stored(program, traced_in, module, report)

    return compile_program(lower, program.name, report), report


def entries(cache: Path) -> list[Path]:
    return sorted((cache / "traced").iterdir())


def test_a_later_process_reads_what_was_traced(cache: Path) -> None:
    function = Counted()
    first, report = compiled(function)
    assert (function.traces, report.programs.from_store) == (1, 0)
    again, later = compiled(function)
    assert (function.traces, later.programs.from_store) == (1, 1)
    for ours, expected in zip(again(X, X), first(X, X), strict=True):
        np.testing.assert_array_equal(ours, expected)
    direct = jax.jit(Counted()).lower(X, X).compile()
    for ours, expected in zip(again(X, X), direct(X, X), strict=True):
        np.testing.assert_array_equal(ours, expected)
    text = again.executable.as_text()
    assert text.startswith("HloModule jit_two_products") and "mid_block" in text
    (entry,) = entries(cache)
    assert (cache / "traced").stat().st_mode & 0o777 == 0o700
    assert entry.stat().st_size < 20_000


def test_what_is_read_has_one_entry_of_the_compile_cache_with_what_was_traced(cache: Path) -> None:
    _, first = compiled(Counted())
    _, again = compiled(Counted())
    assert (first.programs.compiled, again.programs.from_cache) == (1, 1)


def test_memory_is_given_away_as_asked(cache: Path) -> None:
    for _ in range(2):
        program, _ = compiled(Counted(), donated=1)
        assert program.executable.memory_analysis().alias_size_in_bytes == X.nbytes


def test_where_results_lie_is_asked_for_anew(cache: Path) -> None:
    mesh = make_mesh(SINGLE | {"data": 2}, jax.devices())
    own = NamedSharding(mesh, PartitionSpec("data"))
    there = jax.device_put(X, own)
    for _ in range(2):
        program, report = compiled(Counted(), arguments=(there, there), out_shardings=(own, own))
        assert all(result.sharding == own for result in program(there, there))
    assert report.programs.from_store == 1


def test_what_is_made_anew(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions, code, flags, configs, shapes, meshes: each is another program."""
    function = Counted()

    def traces(*arguments: Any, **more: Any) -> int:
        before = function.traces
        compiled(function, *arguments, **more)
        return function.traces - before

    assert traces() == 1 and traces() == 0
    assert traces("another config") == 1
    assert traces(frozenset({"a", "b"})) == 1 and traces(frozenset({"b", "a"})) == 0
    assert traces("key", (X[:1], X)) == 1
    assert traces("key", (X.astype(np.float16), X)) == 1
    layouts = [{"data": 2}, {"rows": 2}, {"data": 2, "rows": 2}]
    for sizes in layouts:
        mesh = make_mesh(SINGLE | sizes, jax.devices()[:4])
        there = jax.device_put(X, NamedSharding(mesh, PartitionSpec()))
        assert traces("key", (there, there)) == 1 and traces("key", (there, there)) == 0
    with jax.default_matmul_precision("highest"):
        assert traces() == 1
    versions = program_store.importlib.metadata.version
    for package in ("jax", "torch", "diffusers"):
        with monkeypatch.context() as patch:
            changed = {package: "0.0.1"}
            patch.setattr(
                program_store.importlib.metadata,
                "version",
                lambda name, changed=changed: changed.get(name) or versions(name),
            )
            assert traces() == 1
    assert traces() == 0
    # Our own code, and that of the module, wherever it stands.
    code = tmp_path / "common" / "some.py"
    code.parent.mkdir()
    code.write_text("a = 1")
    monkeypatch.setattr(program_store, "PROJECT_DIR", tmp_path)
    assert traces() == 1 and traces() == 0
    code.write_text("a = 2")
    assert traces() == 1
    theirs = tmp_path / "their_model.py"
    theirs.write_text("import torch\nclass Own(torch.nn.Module): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    import their_model  # type: ignore[import-not-found]

    own = their_model.Own()
    assert traces(module=own) == 1 and traces(module=own) == 0
    theirs.write_text("import torch\nclass Own(torch.nn.Module): a = 1\n")
    assert traces(module=own) == 1
    sys.modules.pop("their_model")


@pytest.mark.parametrize(
    "damage", [lambda c: c[:100], lambda _: b"", lambda c: c[:-1] + bytes([c[-1] ^ 1])]
)
def test_a_damaged_entry_is_removed_and_made_anew(
    cache: Path, damage: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    function = Counted()
    compiled(function)
    (entry,) = entries(cache)
    entry.write_bytes(damage(entry.read_bytes()))
    compiled(function)
    assert function.traces == 2
    compiled(function)
    assert function.traces == 2
    said = f"warning: {entry} is damaged: it is removed, and the program traced anew\n"
    assert capsys.readouterr().err == said


def test_those_that_were_not_used_for_long_make_room(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled(Counted(), "first")
    (first,) = entries(cache)
    compiled(Counted(), "second")
    (second,) = {*entries(cache)} - {first}
    compiled(Counted(), "first")  # which is used
    monkeypatch.setattr(program_store, "MOST_BYTES", int(2.5 * first.stat().st_size))
    compiled(Counted(), "third")
    assert first in entries(cache) and second not in entries(cache)
    assert len(entries(cache)) == 2


def test_what_cannot_be_kept_is_traced(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def with_a_callback(x: jax.Array, y: jax.Array) -> jax.Array:
        jax.debug.callback(lambda: None)
        return x + y

    program, _ = compiled(with_a_callback)
    np.testing.assert_array_equal(program(X, X), 2 * X)
    assert not entries(cache)
    assert "two_products cannot be kept traced" in capsys.readouterr().out


def test_a_kernel_tells_no_folder(cache: Path) -> None:
    """Its body is part of the compile cache's key."""
    jax_start.set_up_jax()
    shape = jax.ShapeDtypeStruct((1, 2, 1024, 64), jnp.bfloat16)
    attend = partial(attention, layout=None, platform="tpu")
    text = jax.export.export(jax.jit(attend), platforms=["tpu"])(*[shape] * 3).mlir_module()
    (body,) = re.findall(r"\\22body\\22: \\22([A-Za-z0-9+/=]+)\\22", text)
    names = re.findall(rb"[\w./-]+\.py", base64.b64decode(body))
    assert names and not any(name.startswith(b"/") for name in names)


def test_code_that_changed_since_it_was_imported_is_not_kept(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its hash would be that of what this process does not run."""
    monkeypatch.setattr(program_store, "_PROCESS_BEGAN", 0.0)
    function = Counted()
    compiled(function)
    compiled(function)
    assert function.traces == 2 and not entries(cache)


def test_folders(cache: Path) -> None:
    (cache / "traced").mkdir()
    (cache / "traced").chmod(0o777)
    with refusal(UnfitEnvironmentError, "can be written by others"):
        compiled(Counted())
    jax.config.update("jax_enable_compilation_cache", False)
    assert store_folder() is None
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", "gs://bucket/compiled")
    assert store_folder() is None
    assert re.fullmatch(r"\.\w+", program_store.ENDING)
