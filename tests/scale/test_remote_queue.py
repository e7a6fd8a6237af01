"""The queue where one process keeps it and others ask."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

remote_queue = pytest.importorskip("common.scale.remote_queue")

import ray

from common.errors import BadSettingError, UnfitEnvironmentError
from common.scale import ray_pools
from common.serving.job_queue import REMOTE_QUEUE, JobQueue, QueueFullError, open_queue
from common.serving.jobs import State, Step
from tests.conftest import PROJECT_DIR
from tests.faults.ray_lists import environment
from tests.refusals import refusal

STEPS = [Step(1, ["--prompt=a"]), Step(2, [])]
SERVING = """
import sys, time
from pathlib import Path
from common.serving.job_queue import open_queue
queue = open_queue(Path(sys.argv[1]))
lock = queue.lock_of("worker")
lock.acquire()
job = queue.claim([1], "worker")
print(job.number, flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment().items():
            patch.setenv(name, value)
        ray_pools.join(None)
        yield
        ray.shutdown()


@pytest.fixture
def queue(cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    (node,) = (each["NodeID"] for each in ray.nodes() if each["Alive"])
    own = {"node": node, "most_waiting": 3}
    place = remote_queue.keep_queue(tmp_path / "jobs", tmp_path / "queue", **own)
    assert remote_queue.keep_queue(tmp_path / "jobs", tmp_path / "queue", **own) == place
    monkeypatch.setenv(REMOTE_QUEUE, place)
    yield open_queue(tmp_path / "jobs")
    remote_queue.end_keeping(place)


@pytest.mark.slow
def test_jobs_are_those_of_the_file(queue: Any, tmp_path: Path) -> None:
    """Each method gives what the file itself gives, and errors come as they are."""
    seen = changes_of(queue)
    first, second = (queue.add(tmp_path / name, STEPS, key=name) for name in "ab")
    assert queue.add(tmp_path / "c", STEPS, key="a") == first
    assert changes_of(queue) != seen
    seen = changes_of(queue)
    assert queue.claim([3], "worker") is None and changes_of(queue) == seen
    claimed = queue.claim([1], "worker")
    assert claimed.number == first.number and claimed.state is State.RUNNING
    queue.hand_on(claimed)
    queue.cancel(second.number)
    with JobQueueOf(tmp_path / "queue") as file:
        assert queue.jobs() == file.jobs() and queue.counts() == file.counts()
        assert queue.get(first.number) == file.get(first.number)
        assert queue.last(5) == file.last(5) and queue.states([1, 2]) == file.states([1, 2])
    for name in "de":
        queue.add(tmp_path / name, STEPS)
    with refusal(QueueFullError, "3 jobs wait, as many as may"):
        queue.add(tmp_path / "f", STEPS)
    assert not hasattr(queue, "_connection") and not hasattr(queue, "nothing")


def changes_of(queue: Any) -> int:
    """Those that the keeper tells, not what was told a moment ago."""
    time.sleep(2 * remote_queue.SECONDS_BETWEEN_CHANGES)
    return int(queue.changes())


class JobQueueOf:
    """The file itself, for a block."""

    def __init__(self, folder: Path) -> None:
        self._queue = JobQueue(folder)

    def __enter__(self) -> JobQueue:
        return self._queue

    def __exit__(self, *_: object) -> None:
        self._queue.close()


@pytest.mark.slow
def test_jobs_of_a_process_that_dies_wait_again(queue: Any, tmp_path: Path) -> None:
    job = queue.add(tmp_path / "a", STEPS)
    process = subprocess.Popen(
        [sys.executable, "-c", SERVING, tmp_path / "jobs"],
        env=os.environ | {"PYTHONPATH": str(PROJECT_DIR)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == f"{job.number}\n"
        assert queue.take_from_the_dead() == []
        assert queue.get(job.number).state is State.RUNNING
    finally:
        process.kill()
        process.wait()
    until = time.monotonic() + 60
    while queue.get(job.number).state is State.RUNNING and time.monotonic() < until:
        queue.take_from_the_dead()
        time.sleep(0.1)
    found = queue.get(job.number)
    assert (found.state, found.worker, found.attempts) == (State.WAITING, None, 1)


@pytest.mark.slow
def test_answers_that_are_lost(queue: Any, tmp_path: Path) -> None:
    """The keeper has done what was asked, and whoever asked does not know."""
    ask = queue._keeper.ask.remote
    ray.get(ask("add", (tmp_path / "a", STEPS), {"key": "of a"}))
    first = queue.add(tmp_path / "b", STEPS, key="of a")  # asked again
    assert first.run_dir == tmp_path / "a" and len(queue.jobs()) == 1
    ray.get(ask("claim", ([1], "worker"), {}))
    others = [queue.add(tmp_path / name, STEPS) for name in "cd"]
    claimed = queue.claim([1], "worker")
    assert claimed == queue.claim([1], "worker") and claimed.number == first.number
    queue.hand_on(claimed)
    queue.hand_on(claimed)  # as one that was asked again
    assert (queue.get(first.number).step.stage, queue.get(first.number).place) == (2, 1)
    assert queue.claim([1], "worker").number == others[0].number
    ray.get(queue._keeper.withdraw.remote(tmp_path / "c"))  # which runs
    ray.get(queue._keeper.withdraw.remote(tmp_path / "d"))
    assert [job.run_dir.name for job in queue.jobs()] == ["a", "c"]
    assert [job.cancel_asked for job in queue.jobs()] == [False, True]


@pytest.mark.slow
def test_a_file_that_cannot_be_opened_for_a_while(
    queue: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A keeper that is begun again says so, and goes on when it can."""
    job, place = queue.add(tmp_path / "a", STEPS), os.environ[REMOTE_QUEUE]
    file, away = tmp_path / "queue" / "jobs.sqlite3", tmp_path / "away"
    file.rename(away)
    file.mkdir()
    seen = changes_of(queue)
    ray.kill(queue._keeper, no_restart=False)
    with refusal(UnfitEnvironmentError, "cannot be used"):
        while changes_of(queue) == seen:  # as long as the one before answers
            pass
    with refusal(UnfitEnvironmentError, "cannot be used"):
        queue.jobs()
    (node,) = (each["NodeID"] for each in ray.nodes() if each["Alive"])
    own = {"node": node, "most_waiting": 3}
    assert remote_queue.keep_queue(tmp_path / "jobs", tmp_path / "queue", **own) == place
    file.rmdir()
    away.rename(file)
    assert queue.jobs() == [job]


@pytest.mark.slow
def test_a_keeper_that_is_begun_again(queue: Any, tmp_path: Path) -> None:
    """What was accepted is there, and who serves is known."""
    job, lock = queue.add(tmp_path / "a", STEPS), queue.lock_of("worker")
    lock.acquire()
    claimed, seen = queue.claim([1], "worker"), changes_of(queue)
    ray.kill(queue._keeper, no_restart=False)
    assert queue.get(job.number) == claimed and changes_of(queue) != seen
    assert queue.take_from_the_dead() == []
    assert queue.get(job.number).state is State.RUNNING
    queue.hand_on(claimed)
    queue.claim([2], "worker")
    lock.release()
    until = time.monotonic() + 30
    while queue.get(job.number).state is State.RUNNING and time.monotonic() < until:
        queue.take_from_the_dead()
        time.sleep(0.1)
    assert queue.get(job.number).attempts == 1


@pytest.mark.slow
def test_one_that_does_not_answer_has_accepted_nothing(
    queue: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is at something else for longer than who asks waits."""
    with monkeypatch.context() as patch:
        patch.setattr(remote_queue, "SECONDS_TO_ANSWER", 0.0)
        with refusal(UnfitEnvironmentError, "does not answer"):
            queue.add(tmp_path / "a", STEPS)
    assert queue.jobs() == []


@pytest.mark.slow
def test_a_queue_is_kept_in_one_folder(queue: Any, tmp_path: Path) -> None:
    (node,) = (each["NodeID"] for each in ray.nodes() if each["Alive"])
    own = {"node": node, "most_waiting": 3}
    with refusal(BadSettingError, "--queue_dir", "other", "is in", "give that"):
        remote_queue.keep_queue(tmp_path / "jobs", tmp_path / "other", **own)
    (tmp_path / "file").touch()
    with refusal(UnfitEnvironmentError, "--queue_dir", "file", "cannot be used"):
        remote_queue.keep_queue(tmp_path / "more", tmp_path / "file", **own)
    place = remote_queue.keep_queue(tmp_path / "more", tmp_path / "right", **own)
    remote_queue.end_keeping(place)


@pytest.mark.slow
def test_a_queue_that_nobody_keeps(cluster: None, tmp_path: Path) -> None:
    address = ray.get_runtime_context().gcs_address
    with refusal(UnfitEnvironmentError, "cannot be reached"):
        remote_queue.RemoteQueue(tmp_path, f"{address} nobody")
