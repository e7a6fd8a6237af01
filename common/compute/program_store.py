"""Traced programs, kept beside the compile cache: a later process reads what tracing gave.

Tracing a UNet takes a second for a small one and five for SDXL's, in every process. What it gives,
StableHLO by `jax.export`, is kept under a key of all that shaped it. What is read is compiled as
what was just traced: programs are always called through what would be kept, so that both have one
entry of the compile cache. Donation and names are given anew, which `jax.export` does not keep.

An entry is run as it is, so the folder is readable by its owner alone.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable, Hashable, Iterator
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
import psutil
from jax import export

from common import private_cache
from common.compute.clock import StageReport
from common.errors import UnfitEnvironmentError
from common.messages import say, warn
from common.models.model_settings import PROJECT_DIR
from common.whole_files import remove_file, write_bytes_whole

FOLDER, ENDING = "traced", ".stablehlo"
MOST_BYTES = 1 << 30  # of all entries; those that were not used for the longest time go
HASH_BYTES = 32  # of sha256, before what was exported
PACKAGES = ("jax", "jaxlib", "torch", "torchax", "diffusers", "transformers", "numpy")
# Which jax.export keeps only if asked, since they may change with its version; the key has that.
CUSTOM_CALLS = ("__cudnn$fmhaSoftmax",)


@dataclass(frozen=True, kw_only=True)
class ToCompile:
    """A program that is not traced yet: a function, and what it is called with."""

    name: str  # under which compile logs and traces show it
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    donated: int | None = None  # the argument whose memory it takes over
    out_shardings: Any = None

    def lower(self) -> Any:
        """Trace it now."""
        return self._jit(self.function).lower(*self.arguments)

    def exported(self) -> export.Exported:
        """Trace it now, as what can be kept."""
        checks = [export.DisabledSafetyCheck.custom_call(name) for name in CUSTOM_CALLS]
        return export.export(self._jit(self.function), disabled_checks=checks)(*self.arguments)

    def lower_exported(self, exported: export.Exported) -> Any:
        """As `lower`, of what was traced before."""
        return self._jit(exported.call).lower(*self.arguments)

    def _jit(self, function: Callable[..., Any]) -> Any:
        def program(*arguments: Any) -> Any:
            return function(*arguments)

        program.__name__ = program.__qualname__ = self.name
        how = {} if self.out_shardings is None else {"out_shardings": self.out_shardings}
        return jax.jit(program, donate_argnums=() if self.donated is None else self.donated, **how)


def lower_stored(program: ToCompile, traced_in: Hashable, module: Any, report: StageReport) -> Any:
    """Trace a program, or read what tracing gave in an earlier process.

    Args:
        traced_in: what its trace depends on besides the arguments' shapes and shardings, and what
            `_facts` has.
        module: torch's, whose code is traced.
    """
    folder = store_folder()
    if folder is None or jax.process_count() > 1 or _code_has_changed(module):
        return program.lower()
    path = folder / f"{_key(program, traced_in, module)}{ENDING}"
    exported = _read(path)
    if exported is not None:
        report.programs.from_store += 1
        return program.lower_exported(exported)
    try:
        exported = program.exported()
        content = bytes(exported.serialize())
    except (ValueError, NotImplementedError) as error:
        say(f"  {program.name} cannot be kept traced ({str(error).splitlines()[0][:100]})")
        return program.lower()
    _write(path, content)
    return program.lower_exported(exported)


def store_folder() -> Path | None:
    """Where traced programs are kept; None where jax keeps no compiled ones in a local folder.

    Raises:
        UnfitEnvironmentError: others can write to it.
    """
    named = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    enabled = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    if named is None or not enabled or "://" in str(named):
        return None
    folder = Path(named) / FOLDER
    private_cache.make_private(folder)
    return folder if folder.is_dir() else None


def _read(path: Path) -> export.Exported | None:
    """What is kept there; one that is damaged is removed."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    known, kept = content[:HASH_BYTES], content[HASH_BYTES:]
    if hashlib.sha256(kept).digest() == known:
        with suppress(Exception):  # of another format, under the same version
            exported = export.deserialize(bytearray(kept))
            with suppress(OSError):
                os.utime(path)  # it was used
            return exported
    warn(f"{path} is damaged: it is removed, and the program traced anew")
    with suppress(OSError, UnfitEnvironmentError):
        remove_file(path)
    return None


def _write(path: Path, content: bytes) -> None:
    """Keep an entry, whole or not at all; those that were not used for long make room."""
    with suppress(OSError, UnfitEnvironmentError):  # without it the next process traces again
        write_bytes_whole(path, hashlib.sha256(content).digest() + content)
        entries = [(each.stat(), each) for each in path.parent.glob(f"*{ENDING}")]
        room = MOST_BYTES
        for status, each in sorted(entries, key=lambda entry: -entry[0].st_mtime):
            room -= status.st_size
            if room < 0 and each != path:
                remove_file(each)


# --- the key -------------------------------------------------------------------------------------


def _key(program: ToCompile, traced_in: Hashable, module: Any) -> str:
    leaves, structure = jax.tree.flatten(program.arguments)
    facts = {
        "name": program.name,
        "traced_in": _in_order(traced_in),
        "arguments": [str(structure), *map(_described, leaves)],
        "code": [_hash_of(path) for path in sorted(_files_of(module))],
        "flags": _flags(),
        **_facts(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _described(leaf: Any) -> str:
    """An argument's shape, dtype and where it lies."""
    sharding = _in_order(getattr(leaf, "sharding", None))
    return f"{leaf.shape} {leaf.dtype} {getattr(leaf, 'weak_type', False)} {sharding}"


def _in_order(value: Any) -> str:
    """A value in words that are the same in each process: sets in order, devices by their kind."""
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_in_order, value))})"
    if isinstance(value, frozenset | set):
        return f"{{{', '.join(sorted(map(_in_order, value)))}}}"
    if isinstance(value, jax.sharding.Mesh):
        kinds = sorted({device.device_kind for device in value.devices.flat})
        return f"mesh {dict(value.shape)} {value.axis_types} {kinds}"
    if isinstance(value, jax.sharding.NamedSharding):
        return f"{_in_order(value.mesh)} {value.spec} {value.memory_kind}"
    if isinstance(value, type):
        file = _file_of(value.__module__)
        code = "" if file is None else _hash_of(file)
        return f"{value.__module__}.{value.__qualname__} {code}"
    if is_dataclass(value):
        own = ((each.name, getattr(value, each.name)) for each in fields(value))
        return f"{type(value).__name__}({', '.join(f'{n}={_in_order(v)}' for n, v in own)})"
    return repr(value)


def _code_has_changed(module: Any) -> bool:
    """Whether a file is newer than this process, which may have imported what it was before."""
    files = (*_own_files(), *map(Path, _files_of(module)))
    return any(path.stat().st_mtime > _PROCESS_BEGAN for path in files)


def _own_files() -> list[Path]:
    """The files of our own code."""
    return sorted((PROJECT_DIR / "common").rglob("*.py"))


_PROCESS_BEGAN = psutil.Process().create_time()


@cache
def _facts() -> dict[str, Any]:
    """What shapes all traces of this process."""
    own = hashlib.sha256()
    for path in _own_files():
        own.update(path.read_bytes())
    return {
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "own code": own.hexdigest(),
        "platform": jax.default_backend(),
    }


def _flags() -> list[str]:
    """jax's settings, but for those that say where things are kept and what is logged."""
    apart = ("cache", "log", "dir", "platform")
    return sorted(
        f"{name}={value}"
        for name, value in jax.config.values.items()
        if not any(part in name for part in apart)
    )


def _files_of(module: Any) -> Iterator[str]:
    """The files whose code a module is of."""
    for name in {type(each).__module__ for each in module.modules()}:
        if (file := _file_of(name)) is not None:
            yield file


def _file_of(name: str) -> str | None:
    """The file of a module that is imported."""
    file = getattr(sys.modules.get(name), "__file__", None)
    return file if file is not None and Path(file).is_file() else None


@cache
def _hash_of(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
