"""Write files that appear whole or not at all."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from common.errors import UnfitEnvironmentError

LEFTOVER = re.compile(r"\..+\.\d+\.tmp")
_unfinished: set[Path] = set()  # files that this process removes when it ends at once


@contextmanager
def replace_whole(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to; then put it in place at once.

    The file appears whole or not at all: written, flushed to the disk, then renamed. After an
    error the old file is as it was and the temporary one is gone.

    Raises:
        UnfitEnvironmentError: the folder cannot be written, or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    _unfinished.add(temporary)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        put_on_disk(temporary)
        temporary.replace(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UnfitEnvironmentError(
            f"{path} cannot be written ({reason}): make room or choose another --output_dir"
        ) from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        _unfinished.discard(temporary)


def put_on_disk(path: Path) -> None:
    """Wait until a file's content, or the names of a folder's files, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of processes that were killed; the caller is the only writer."""
    for path in folder.glob(".*.tmp"):
        if path not in _unfinished and LEFTOVER.fullmatch(path.name):
            with suppress(OSError):
                path.unlink()


def remove_if_stopped(path: Path) -> None:
    """Let a file go with the process if that ends at once."""
    _unfinished.add(path)


def keep_if_stopped(path: Path) -> None:
    """Take that back."""
    _unfinished.discard(path)


def remove_unfinished() -> None:
    """Remove what is not to stay behind, for a process that ends at once."""
    for temporary in list(_unfinished):
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_file(path: Path) -> None:
    """Remove a file that may not be there.

    Raises:
        UnfitEnvironmentError: the folder cannot be written.
    """
    if path.exists():
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise UnfitEnvironmentError(
                f"{path} cannot be removed ({error.strerror}): make its folder writable, or choose "
                "another --output_dir"
            ) from None


def copy_whole(source: Path, path: Path) -> None:
    """Let a file stand at another place as well, whole or not at all; one copy where that can be.

    Such a file is never written to, only replaced.
    """
    with replace_whole(path) as temporary:
        try:
            os.link(source, temporary)
        except OSError:  # on another disk, or one that knows no links
            shutil.copyfile(source, temporary)


def write_bytes_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    with replace_whole(path) as temporary:
        temporary.write_bytes(content)


def write_text_whole(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replace_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
