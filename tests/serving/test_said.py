"""What stages print for a program that waits for them."""

import sys
from pathlib import Path

import pytest

from common.messages import say, warn
from common.serving.job_queue import JobQueue
from common.serving.jobs import Step
from common.serving.said import SAID_FOLDER, SaidByStages


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
