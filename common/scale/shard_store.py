"""Shards where they are kept: on a disk or in an object store, each whole or not at all.

    TARGET/shards/000000000-9f86d081884c7d65/   a run directory, or .tar, or .parquet
    TARGET/index/000000000-9f86d081884c7d65.parquet   a row for each picture; there last
    TARGET/index.parquet, failed.parquet        of all shards, when all are done

A name has the number of the shard's first row and the fingerprint of what its pictures depend on: a
shard is done where the index has a file of its name, whoever made it and how often.
"""

import io
import json
import re
import secrets
import shutil
import socket
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import pyarrow
from filelock import FileLock, Timeout
from fsspec.implementations.local import LocalFileSystem
from pyarrow import parquet

from common.errors import StageError, UnfitEnvironmentError, in_one_line
from common.files.stage_table import LATENTS_FILE
from common.runs.run_index import read_index
from common.scale.planning import Format
from common.scale.shards import Failure
from common.whole_files import put_on_disk, replace_whole

Read = TypeVar("Read")
SHARDS, INDEX = "shards", "index"
_ENDINGS: dict[Format, str] = {"folder": "/", "webdataset": ".tar", "parquet": ".parquet"}
INDEX_FILE, FAILED_FILE = "index.parquet", "failed.parquet"
LOCK_FILE = ".lock"
MOST_READ = 32  # files at once
NAME_LENGTH = 9 + 1 + 16
_OURS = re.compile(r"(\.?)(\d{9}-[0-9a-f]{16})(?=[./]|$)")
INDEX_SCHEMA = pyarrow.schema(
    [
        ("row", pyarrow.int64()),  # among all, from 0
        ("image", pyarrow.int64()),  # among the row's, from 0
        ("id", pyarrow.string()),  # the row's own
        ("prompt", pyarrow.string()),
        ("seed", pyarrow.uint64()),
        ("file", pyarrow.string()),  # within the target; of a tar or table its member
        ("fingerprint", pyarrow.string()),  # of the picture's recipe
        ("seconds", pyarrow.float64()),
        ("flagged", pyarrow.bool_()),  # by a safety checker; null: none has looked
        ("host", pyarrow.string()),
    ]
)
FAILED_SCHEMA = pyarrow.schema(
    [
        ("row", pyarrow.int64()),
        ("where", pyarrow.string()),
        ("error", pyarrow.string()),
        ("exit_code", pyarrow.int32()),
    ]
)


class ShardStore:
    """A target, as a path or URL of fsspec's."""

    def __init__(self, target: str, form: Format = "folder", *, latents: bool = False) -> None:
        """
        Args:
            form: of shards.
            latents: keep stage 2's beside the pictures of a folder.

        Raises:
            UnfitEnvironmentError: there is no such kind of target here.
        """
        self.target, self.form, self._latents = target, form, latents
        try:
            self._system, self._root = fsspec.core.url_to_fs(target)
        except (ImportError, ValueError, OSError) as error:
            raise UnfitEnvironmentError(
                f"--output_dir {target} cannot be reached: {in_one_line(error)}"
            ) from None
        self._is_local = isinstance(self._system, LocalFileSystem)

    # --- what is there --------------------------------------------------------------------------

    def done(self) -> set[str]:
        """The names of the shards that are done."""
        self._system.invalidate_cache()
        try:
            found = self._system.ls(f"{self._root}/{INDEX}", detail=False)
        except FileNotFoundError:
            return set()
        names = {path.rpartition("/")[2].partition(".")[0] for path in found}
        return {name for name in names if len(name) == NAME_LENGTH}

    def is_done(self, name: str) -> bool:
        """Whether a shard is."""
        self._system.invalidate_cache()
        return bool(self._system.exists(self._index_of(name)))

    def failures(self, names: Sequence[str]) -> list[Failure]:
        """The rows of done shards that have no pictures."""
        schemas = self._of_each(names, parquet.read_schema)
        return [failure for schema in schemas for failure in _failures_in(schema)]

    def _of_each(self, names: Sequence[str], read: Callable[[Any], Read]) -> Iterator[Read]:
        """What of done shards' indices is read, many at once: of an object store each takes long.

        Args:
            read: is given a file.
        """

        def read_one(name: str) -> Read:
            with self._system.open(self._index_of(name), "rb") as file:
                return read(file)

        with ThreadPoolExecutor(MOST_READ) as threads:
            for first in range(0, len(names), 8 * MOST_READ):  # no more than these in memory
                yield from threads.map(read_one, names[first : first + 8 * MOST_READ])

    def _index_of(self, name: str) -> str:
        return f"{self._root}/{INDEX}/{name}.parquet"

    # --- what is made ---------------------------------------------------------------------------

    def commit(
        self,
        name: str,
        run_dir: Path | None,
        images: int,
        ids: Mapping[int, str | None],
        failures: Sequence[Failure],
    ) -> None:
        """Put a shard in its place; one that was there before stays.

        Args:
            run_dir: a whole run's; None where no row has pictures.
            images: how many pictures it has to have.
            ids: of rows, by their numbers.
        """
        if self.is_done(name):  # by a process that was taken for dead
            return
        lines = [] if run_dir is None else read_index(run_dir)
        if len(lines) != images:
            raise StageError(f"shard {name} has {len(lines)} pictures of {images}")
        with _writing(self.target):
            place = f"{SHARDS}/{name}{_ENDINGS[self.form]}"
            entries = list(_entries(lines, ids, place))
            if run_dir is not None:
                self._put_shard(name, run_dir, place, entries)
                if self.is_done(name):  # meanwhile
                    return
            told = {b"failures": json.dumps(failures).encode()}
            table = pyarrow.Table.from_pylist(entries, INDEX_SCHEMA).replace_schema_metadata(told)
            content = io.BytesIO()
            parquet.write_table(table, content)
            self._put_file(f"{INDEX}/{name}.parquet", content.getvalue())

    def _put_shard(
        self, name: str, run_dir: Path, place: str, entries: Sequence[dict[str, Any]]
    ) -> None:
        if self.form == "folder":
            latents = {LATENTS_FILE} if self._latents else set()
            kept = (p for p in files_of(run_dir) if p.suffix != ".safetensors" or p.name in latents)
            self._put_folder(name, place.rstrip("/"), kept)
        elif self.form == "webdataset":
            content = io.BytesIO()
            with tarfile.open(fileobj=content, mode="w") as tar:
                for entry in entries:
                    picture = run_dir / entry["source"]
                    key = entry["file"].partition("#")[2].rpartition(".")[0]
                    told = {k: v for k, v in entry.items() if k != "source"}
                    for ending, data in (
                        (picture.suffix[1:], picture.read_bytes()),
                        ("txt", (entry["prompt"] or "").encode()),
                        ("json", json.dumps(told, ensure_ascii=False).encode()),
                    ):
                        member = tarfile.TarInfo(f"{key}.{ending}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
            self._put_shard_file(name, place, content.getvalue())
        else:
            pictures = [(run_dir / entry["source"]).read_bytes() for entry in entries]
            table = pyarrow.Table.from_pylist(list(entries), INDEX_SCHEMA)
            column = pyarrow.array(pictures, pyarrow.large_binary())
            content = io.BytesIO()
            parquet.write_table(table.append_column("picture", column), content)
            self._put_shard_file(name, place, content.getvalue())

    def _put_folder(self, name: str, place: str, files: Iterable[Path]) -> None:
        if not self._is_local:  # nobody looks before the index has it
            names = [str(path) for path in files]  # all at once
            self._system.put(names, [f"{self._root}/{place}/{Path(n).name}" for n in names])
            return
        final = Path(self._root) / place
        temporary, old = (
            final.with_name(f".{final.name}.{secrets.token_hex(4)}.{ending}")
            for ending in ("tmp", "old")
        )
        temporary.mkdir(parents=True)
        try:
            for path in files:
                to = temporary / path.name
                shutil.copy2(path, to)
                put_on_disk(to)  # before the index says that it is there
            put_on_disk(temporary)
            if self.is_done(name):  # another attempt at the same shard was faster
                return
            # One of the same name was left by a process that died before the index had it.
            with suppress(FileNotFoundError):
                final.rename(old)
            try:
                temporary.rename(final)
            except OSError:  # as above, just now
                if not final.is_dir():
                    raise
            put_on_disk(final.parent)
        finally:
            for left in (temporary, old):
                shutil.rmtree(left, ignore_errors=True)

    def _put_shard_file(self, name: str, place: str, content: bytes) -> None:
        if not self.is_done(name):  # as of a folder
            self._put_file(place, content)

    def _put_file(self, place: str, content: bytes) -> None:
        with self._whole(place) as file:
            file.write(content)

    # --- when all is done -----------------------------------------------------------------------

    def finish(self, names: Sequence[str]) -> tuple[int, int]:
        """Write the index of all shards and what failed, and remove what is of no shard.

        Returns how many pictures and how many failures there are.

        Args:
            names: of all shards, in the order of their rows.
        """
        pictures = 0
        failures: list[Failure] = []
        with _writing(self.target):
            with (
                self._whole(INDEX_FILE) as file,
                parquet.ParquetWriter(file, INDEX_SCHEMA) as writer,
            ):
                for table in self._of_each(names, parquet.read_table):
                    failures += _failures_in(table.schema)
                    pictures += table.num_rows
                    writer.write_table(table.replace_schema_metadata(None))
            if failures:
                rows = [failure._asdict() for failure in failures]
                failed = io.BytesIO()
                parquet.write_table(pyarrow.Table.from_pylist(rows, FAILED_SCHEMA), failed)
                self._put_file(FAILED_FILE, failed.getvalue())
            else:
                self._remove(FAILED_FILE)
            self._remove_others({*names})
        return pictures, len(failures)

    @contextmanager
    def _whole(self, name: str) -> Iterator[Any]:
        """A file to write to, which is there when the block has ended without an error."""
        if self._is_local:
            with replace_whole(Path(self._root) / name) as temporary, temporary.open("wb") as file:
                yield file
            return
        with tempfile.TemporaryFile() as file:
            yield file
            file.seek(0)
            with self._system.open(f"{self._root}/{name}", "wb") as to:
                shutil.copyfileobj(file, to)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Within the block no other program makes a list here; of a target on a disk.

        Raises:
            UnfitEnvironmentError: one does, or nothing can be written here.
        """
        if not self._is_local:
            with _writing(self.target):
                self._put_file(LOCK_FILE, b"")
                self._remove(LOCK_FILE)
            yield
            return
        with _writing(self.target):
            Path(self._root).mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(Path(self._root) / LOCK_FILE, timeout=0):
                yield
        except Timeout:
            raise UnfitEnvironmentError(
                f"another program makes a list in {self.target}: wait for it, or choose another "
                "--output_dir"
            ) from None

    def _remove_others(self, names: set[str]) -> None:
        """Remove what earlier lists or other settings made, and what was left half."""
        for folder in (INDEX, SHARDS):  # a shard's index first: without it there is no shard
            self._system.invalidate_cache()
            with suppress(FileNotFoundError):
                for path in self._system.ls(f"{self._root}/{folder}", detail=False):
                    own = path.rstrip("/").rpartition("/")[2]
                    shard = _OURS.match(own)  # others' files are theirs
                    if shard is not None and (shard[2] not in names or shard[1]):
                        self._system.rm(path, recursive=True)

    def _remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._system.rm_file(f"{self._root}/{name}")


def files_of(run_dir: Path) -> list[Path]:
    """A run directory's files that are whole."""
    return [path for path in sorted(run_dir.iterdir()) if path.is_file() and path.name[0] != "."]


def _failures_in(schema: Any) -> list[Failure]:
    """Those that a shard's index tells beside its rows."""
    told = (schema.metadata or {}).get(b"failures", b"[]")
    return [Failure(*each) for each in json.loads(told)]


def _entries(
    lines: Iterable[dict[str, Any]], ids: Mapping[int, str | None], place: str
) -> Iterator[dict[str, Any]]:
    """The index's rows of a shard.

    Args:
        lines: of its run's own index, whose ids are the rows' numbers.
        ids: the rows' own.
        place: the shard's; of a folder with a slash at its end.
    """
    host, seen = socket.gethostname(), Counter[int]()
    for line in lines:
        row = int(line["id"][:9])
        ending = Path(line["file"]).suffix
        image = seen[row]
        seen[row] += 1
        member = line["file"] if place.endswith("/") else f"#{row:09d}_{image:04d}{ending}"
        yield {
            "row": row,
            "image": image,
            "id": ids.get(row),
            "prompt": line["prompt"],
            "seed": line["seed"],
            "file": f"{place}{member}",
            "fingerprint": line["fingerprint"],
            "seconds": line.get("seconds"),
            "flagged": None,
            "host": host,
            "source": line["file"],
        }


@contextmanager
def _writing(target: str) -> Iterator[None]:
    try:
        yield
    except StageError:
        raise
    except Exception as error:  # of each kind of target its own
        raise UnfitEnvironmentError(
            f"--output_dir {target} cannot be written ({in_one_line(error)}): make room, or choose "
            "another"
        ) from None
