"""A job as the queue's table has it."""

from pathlib import Path

from common.serving.job_queue import JobQueue
from common.serving.jobs import Caller, Likeness, State, Step


def test_what_is_asked_for_is_read_back(tmp_path: Path) -> None:
    queue = JobQueue(tmp_path / "jobs")
    steps = [Step(1, ["--prompt=ä\n"]), Step(3, [])]
    added = queue.add(
        tmp_path / "run",
        steps,
        priority=2,
        key="k",
        caller=Caller("/a", "/b"),
        likeness=Likeness("x", 2, 30),
    )
    queue.add(tmp_path / "other", steps)
    queue.close()
    again = JobQueue(tmp_path / "jobs")
    found, other = again.jobs()
    assert found == added and found.step == steps[0] and found.run_dir == tmp_path / "run"
    assert (found.caller, found.likeness) == (Caller("/a", "/b"), Likeness("x", 2, 30))
    assert (found.key, found.priority, found.state) == ("k", 2, State.WAITING)
    assert other.caller is None and other.likeness is None and not other.has_ended
    again.close()
