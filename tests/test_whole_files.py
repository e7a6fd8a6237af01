"""Files appear whole or not at all."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UnfitEnvironmentError
from common.files.stage_table import TRAJECTORY_FILE
from common.whole_files import (
    copy_whole,
    keep_if_stopped,
    remove_file,
    remove_if_stopped,
    remove_leftovers,
    remove_unfinished,
    replace_whole,
    write_bytes_whole,
    write_text_whole,
)
from tests.conftest import PROJECT_DIR
from tests.refusals import refusal


def test_a_file_is_there_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "made" / "file"
    with replace_whole(path) as temporary:
        temporary.write_text("half")
        assert not path.exists()
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file"
    write_text_whole(path, "old")
    with pytest.raises(error), replace_whole(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_names_the_mend(tmp_path: Path) -> None:
    """/dev/full is a disk without room."""
    path = tmp_path / "file"
    with (
        pytest.raises(UnfitEnvironmentError, match=r"file cannot be written .*--output_dir"),
        replace_whole(path),
        Path("/dev/full").open("w", buffering=1) as full,
    ):
        full.write("text\n")
    assert not path.exists()


@pytest.mark.parametrize("links", [True, False])
def test_a_file_stands_at_another_place_too(
    tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also twice, and where the disk knows no links."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    source, path = tmp_path / "source", tmp_path / "made" / "file"
    source.write_text("first")
    for _ in range(2):
        copy_whole(source, path)
        assert path.read_text() == "first" and list(path.parent.iterdir()) == [path]
    write_text_whole(source, "second")
    assert path.read_text() == "first"


def test_bytes_and_text_are_written_as_they_are(tmp_path: Path) -> None:
    write_bytes_whole(tmp_path / "bytes", b"\r\n\x00")
    write_text_whole(tmp_path / "text", "ein Stern ★\n")
    assert (tmp_path / "bytes").read_bytes() == b"\r\n\x00"
    assert (tmp_path / "text").read_bytes() == "ein Stern ★\n".encode()


def test_only_leftovers_of_other_processes_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".file.123.tmp").touch()
    kept = {tmp_path / name for name in ("file.123.tmp", ".file.tmp", "file")}
    for path in kept:
        path.touch()
    with replace_whole(tmp_path / "own") as temporary:
        temporary.touch()
        remove_leftovers(tmp_path)
        assert set(tmp_path.iterdir()) == {*kept, temporary}


def test_a_process_that_ends_at_once_leaves_nothing_half_done(tmp_path: Path) -> None:
    program = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from common.whole_files import *\n"
        "folder = Path(sys.argv[1])\n"
        "for name in ('gone', 'kept'):\n"
        "    (folder / name).touch()\n"
        "    remove_if_stopped(folder / name)\n"
        "keep_if_stopped(folder / 'kept')\n"
        "with replace_whole(folder / 'file') as temporary:\n"
        "    temporary.touch()\n"
        "    remove_unfinished()\n"
        "    os._exit(9)\n"
    )
    command = [sys.executable, "-c", program, os.fspath(tmp_path)]
    assert subprocess.run(command, cwd=PROJECT_DIR).returncode == 9
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_file_that_may_not_be_there_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    remove_file(path)
    path.touch()
    remove_file(path)
    assert not path.exists()
    path.mkdir()
    with pytest.raises(UnfitEnvironmentError, match=r"cannot be removed .* another --output_dir"):
        remove_file(path)


def test_what_is_taken_back_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    remove_if_stopped(path)
    keep_if_stopped(path)
    remove_unfinished()
    assert path.exists()


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replace_whole(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_an_environment_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UnfitEnvironmentError, match="--output_dir"),
        replace_whole(tmp_path / "file" / "below") as temporary,
    ):
        temporary.write_text("")


def test_a_file_of_ours_that_cannot_be_removed(tmp_path: Path) -> None:
    path = tmp_path / TRAJECTORY_FILE
    path.mkdir()
    with refusal(UnfitEnvironmentError, f"{path} cannot be removed", "another --output_dir"):
        remove_file(path)
