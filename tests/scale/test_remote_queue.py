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

from common.errors import UnfitEnvironmentError
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
    seen = queue.changes()
    first, second = (queue.add(tmp_path / name, STEPS, key=name) for name in "ab")
    assert queue.add(tmp_path / "c", STEPS, key="a") == first
    assert queue.changes() != seen
    seen = queue.changes()
    assert queue.claim([3], "worker") is None and queue.changes() == seen
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
def test_a_queue_that_nobody_keeps(cluster: None, tmp_path: Path) -> None:
    address = ray.get_runtime_context().gcs_address
    with refusal(UnfitEnvironmentError, "cannot be reached"):
        remote_queue.RemoteQueue(tmp_path, f"{address} nobody")
