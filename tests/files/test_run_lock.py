"""One writer for each run directory, looked at with a second process."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.errors import UnfitEnvironmentError
from common.files import run_lock
from common.files.run_lock import HELD_BY_PARENT, RUN_LOCK, STAGE_LOCK, RunLock
from common.files.stage_table import EMBEDDINGS_FILE
from tests.conftest import PROJECT_DIR
from tests.refusals import call, refusal

HOLD = """
import sys
from pathlib import Path
from common.files.run_lock import RunLock
lock = RunLock.of_stage(Path(sys.argv[1]), wait=False)
lock.acquire()
print("held", flush=True)
sys.stdin.read()
if sys.argv[2] == "release":
    lock.release()
else:
    import os
    os._exit(1)
"""

Holder = subprocess.Popen[str]


def start(run_dir: Path, how: str, code: str = HOLD) -> Holder:
    return subprocess.Popen(
        [sys.executable, "-c", code, str(run_dir), how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=PROJECT_DIR,
    )


def hold(run_dir: Path, how: str = "release") -> Holder:
    """A process that holds a run directory until its input ends."""
    process = start(run_dir, how)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def end(process: Holder) -> None:
    process.communicate(timeout=60)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Holder]:
    process = hold(tmp_path / "run")
    yield process
    if process.poll() is None:
        end(process)


def of_stage(run_dir: Path, **how: bool) -> RunLock:
    return RunLock.of_stage(run_dir, **({"wait": False} | how))


def test_a_second_writer_is_refused_with_the_first_ones_name(
    tmp_path: Path, holder: Holder
) -> None:
    run_dir = tmp_path / "run"
    with pytest.raises(UnfitEnvironmentError) as caught:
        of_stage(run_dir).acquire()
    said = str(caught.value)
    assert f"{run_dir} is in use by -c" in said and f"(process {holder.pid} on " in said
    assert said.endswith("wait for it with --wait, or choose another --output_dir")
    end(holder)
    lock = of_stage(run_dir)
    lock.acquire()
    lock.release()


def test_a_second_writer_may_wait(tmp_path: Path, holder: Holder) -> None:
    waiting = start(tmp_path / "run", "release", HOLD.replace("wait=False", "wait=True"))
    assert waiting.stderr is not None and waiting.stdout is not None
    assert waiting.stderr.readline().startswith(f"waiting: {tmp_path / 'run'} is in use by ")
    end(holder)
    assert waiting.stdout.readline() == "held\n"
    end(waiting)


def test_a_dead_writers_lock_is_free(tmp_path: Path) -> None:
    end(hold(tmp_path, "die"))
    assert {path.name for path in tmp_path.iterdir()} == {RUN_LOCK, STAGE_LOCK}
    lock = of_stage(tmp_path)
    lock.acquire()
    assert len(lock.held) == 2
    lock.release()
    assert not list(tmp_path.iterdir())


def test_a_stage_of_a_run_takes_its_own_lock_beside_its_parents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = RunLock(tmp_path, wait=False, names=(RUN_LOCK,))
    parent.acquire()
    monkeypatch.setenv(HELD_BY_PARENT, os.fspath(tmp_path.resolve()))
    stage = of_stage(tmp_path)
    stage.acquire()
    assert [Path(lock.lock_file).name for lock in stage.held] == [STAGE_LOCK]
    monkeypatch.setenv(HELD_BY_PARENT, os.fspath(tmp_path / "another"))
    with pytest.raises(UnfitEnvironmentError, match="is in use by"):
        of_stage(tmp_path).acquire()
    stage.release()
    parent.release()


def test_a_folder_that_was_made_for_the_lock_goes_with_it(tmp_path: Path) -> None:
    run_dir = tmp_path / "a" / "run"
    lock = of_stage(run_dir)
    lock.acquire(make_folder=False)
    assert not run_dir.exists()
    lock.acquire()
    lock.acquire()  # once more changes nothing
    assert len(lock.held) == 2
    lock.release()
    assert not run_dir.exists()
    lock.acquire()
    (run_dir / "latents").write_text("")
    lock.release()
    assert [path.name for path in run_dir.iterdir()] == ["latents"]


def test_who_does_not_write_locks_nothing(tmp_path: Path) -> None:
    lock = of_stage(tmp_path / "run", writes=False)
    lock.acquire()
    assert not lock.held and not (tmp_path / "run").exists()


def test_a_writer_clears_away_what_killed_ones_left(tmp_path: Path) -> None:
    (tmp_path / f".latents.{2**22 + 1}.tmp").write_text("half")
    (tmp_path / ".mine.tmp").write_text("")
    lock = of_stage(tmp_path)
    lock.acquire()
    lock.release()
    assert [path.name for path in tmp_path.iterdir()] == [".mine.tmp"]


@pytest.mark.parametrize("name", [run_lock.RUN_LOCK, run_lock.STAGE_LOCK])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_lock_that_cannot_be_used(run_dir: Path, number: int, name: str) -> None:
    (run_dir / name).mkdir()
    with refusal(UnfitEnvironmentError, f"{run_dir / name} cannot be used", "--output_dir"):
        call(number, "--output_dir", run_dir)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_run_directory_in_use(run_dir: Path, number: int) -> None:
    """The holder is this process, which says who it is like any other."""
    holder = RunLock(run_dir, wait=False, names=(run_lock.RUN_LOCK,))
    holder.acquire()
    with refusal(
        UnfitEnvironmentError, f"{run_dir} is in use by", f"process {os.getpid()}", "--wait"
    ):
        call(number, "--output_dir", run_dir)
    (run_dir / run_lock.RUN_LOCK).write_text("damaged")
    with refusal(UnfitEnvironmentError, f"{run_dir} is in use by another process", "--wait"):
        call(number, "--output_dir", run_dir)
    holder.release()


def test_an_output_folder_that_is_a_file(run_dir: Path) -> None:
    file = run_dir / EMBEDDINGS_FILE
    content = file.read_bytes()
    with refusal(UnfitEnvironmentError, f"--output_dir {file} is a file", "choose a folder"):
        call(1, "--output_dir", file)
    assert file.read_bytes() == content


def test_pictures_are_written_beside_the_stage_before(tmp_path: Path) -> None:
    """By one process, which holds all when that stage has ended."""
    before, beside, other = (
        RunLock.of_stage(tmp_path, wait=False, **kind)
        for kind in (
            {},
            {"of_pictures": True, "beside": True},
            {"of_pictures": True, "beside": True},
        )
    )
    before.acquire()
    assert run_lock.process_of_stage(tmp_path) == os.getpid()
    beside.acquire()
    assert not beside.is_alone() and [Path(lock.lock_file).name for lock in beside.held] == [
        run_lock.PICTURES_LOCK
    ]
    with pytest.raises(UnfitEnvironmentError, match="is in use by"):
        other.acquire()
    before.release()
    assert run_lock.process_of_stage(tmp_path) is None
    assert beside.is_alone() and len(beside.held) == 3 and beside.is_alone()
    with pytest.raises(UnfitEnvironmentError, match="is in use by"):
        before.acquire()
    beside.release()
    # By itself stage 3 takes it last, so that it waits for a run without keeping it from others.
    alone = RunLock.of_stage(tmp_path, wait=False, of_pictures=True)
    assert alone.names == (RUN_LOCK, STAGE_LOCK, run_lock.PICTURES_LOCK)
    assert not list(tmp_path.iterdir())
