"""What stages print for a program that waits for them."""

import sys
from contextlib import suppress
from pathlib import Path

import pytest

from common.messages import say, warn
from common.serving.job_queue import JobQueue
from common.serving.jobs import Step
from common.serving.said import SAID_FOLDER, STREAMS, SaidByStages


def test_it_goes_from_one_to_the_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    queue = JobQueue(tmp_path / "jobs")
    job = queue.add(tmp_path / "run", [Step(1, [])])
    mine, theirs = (SaidByStages(queue.folder, job) for _ in range(2))
    stdout, stderr = sys.stdout, sys.stderr
    with mine.reading() as files:
        for number in (1, 2):  # a stage after the other
            with theirs.writing():
                say(f"stage {number}: „ä“")
                warn("something")
                assert files["stdout"].read() == f"stage {number}: „ä“\n"  # as it is said
            assert files["stderr"].read() == "warning: something\n"
            assert (sys.stdout, sys.stderr) == (stdout, stderr)
        with pytest.raises(ValueError, match="x"), theirs.writing():
            raise ValueError("x")
        assert sys.stdout is stdout
        (folder,) = (queue.folder / SAID_FOLDER,)
        assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    assert not list((queue.folder / SAID_FOLDER).iterdir())
    assert capsys.readouterr().out == ""


def test_a_full_disk_takes_what_is_said_and_no_more(tmp_path: Path) -> None:
    queue = JobQueue(tmp_path / "jobs")
    job = queue.add(tmp_path / "run", [Step(1, [])])
    (queue.folder / SAID_FOLDER).mkdir()
    for name in STREAMS:
        (queue.folder / SAID_FOLDER / f"{job.number}.{name}").symlink_to("/dev/full")
    before = sys.stdout, sys.stderr
    with suppress(OSError), SaidByStages(queue.folder, job).writing():
        say("something")
    assert (sys.stdout, sys.stderr) == before
