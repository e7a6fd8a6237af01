"""Jobs: accepted for good, claimed once, handed on, taken from the dead."""

import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from common.errors import UnfitEnvironmentError
from common.serving import job_queue
from common.serving.job_queue import MOST_ATTEMPTS, JobQueue, QueueFullError
from common.serving.jobs import Job, Likeness, State, Step
from tests.refusals import refusal

STEPS = [Step(1, ["--prompt=a"]), Step(2, []), Step(3, ["--image_format", "webp"])]


@pytest.fixture
def queue(tmp_path: Path) -> JobQueue:
    return JobQueue(tmp_path / "jobs", most_waiting=5)


def add(queue: JobQueue, **more: Any) -> Job:
    return queue.add(Path("run"), STEPS, **more)


def state_of(queue: JobQueue, job: Job) -> State:
    found = queue.get(job.number)
    assert found is not None
    return found.state


def test_a_job_goes_from_stage_to_stage(queue: JobQueue) -> None:
    job = add(queue)
    assert job.step == STEPS[0] and job.state is State.WAITING and not job.has_ended
    assert queue.claim([2, 3], "w") is None
    for number in (1, 2, 3):
        mine = queue.claim([number], "w")
        assert mine is not None and mine.step == STEPS[number - 1]
        assert mine.began_at is not None and mine.state is State.RUNNING
        assert queue.claim([1, 2, 3], "other") is None
        queue.hand_on(mine)
    done = queue.get(job.number)
    assert done is not None and (done.state, done.exit_code) == (State.DONE, 0)
    assert done.ended_at is not None and done.began_at is not None
    assert done.accepted_at <= done.began_at <= done.ended_at and done.has_ended
    assert queue.get(99) is None


def test_those_with_priority_come_first_then_in_their_order(queue: JobQueue) -> None:
    jobs = [add(queue, priority=priority) for priority in (0, 0, 5, -1)]
    taken = [queue.claim([1], "w") for _ in jobs]
    assert [job.number for job in taken if job is not None] == [
        jobs[k].number for k in (2, 0, 1, 3)
    ]


def test_the_same_request_makes_one_job(queue: JobQueue) -> None:
    first = add(queue, key="a")
    assert add(queue, key="a").number == first.number and add(queue, key="b").number != first.number
    mine = queue.claim([1], "w")
    assert mine is not None
    queue.end(mine, 2, "bad")
    assert add(queue, key="a").state is State.FAILED  # which a retry is told


def test_more_than_may_wait_are_refused(queue: JobQueue) -> None:
    for _ in range(5):
        add(queue)
    with refusal(QueueFullError, "5 jobs wait, as many as may"):
        add(queue)
    queue.cancel(1)
    add(queue)


def test_what_fails_and_what_is_cancelled_ends(queue: JobQueue) -> None:
    jobs = [add(queue) for _ in range(4)]
    failing, cancelled = queue.claim([1], "w"), queue.claim([1], "w")
    assert failing is not None and cancelled is not None
    queue.end(failing, 4, "the VAE gave infinities")
    found = queue.get(failing.number)
    assert found is not None and (found.exit_code, found.error) == (4, "the VAE gave infinities")
    queue.cancel(cancelled.number)  # it runs: it is told
    assert state_of(queue, cancelled) is State.RUNNING
    queue.hand_on(cancelled)  # the stage was done before it heard
    assert state_of(queue, cancelled) is State.CANCELLED
    queue.cancel(jobs[2].number)  # it waits
    assert state_of(queue, jobs[2]) is State.CANCELLED
    assert [job.number for job in queue.jobs(State.WAITING)] == [jobs[3].number]
    assert len(queue.jobs()) == 4


def test_what_is_given_back_waits_where_it_was(queue: JobQueue) -> None:
    add(queue)
    mine = queue.claim([1], "w")
    assert mine is not None
    queue.hand_on(mine)
    mine = queue.claim([2], "w")
    assert mine is not None
    queue.give_back(mine)
    again = queue.claim([1, 2, 3], "other")
    assert again is not None and (again.step, again.attempts) == (STEPS[1], 0)
    queue.hand_on(mine)  # by who has it no more
    found = queue.get(again.number)
    assert found is not None and found.worker == "other" and found.step == STEPS[1]


def _claim_and_die(folder: Path) -> None:
    queue = JobQueue(folder)
    lock = queue.lock_of("dying")
    lock.acquire()
    assert queue.claim([1], "dying") is not None
    os.kill(os.getpid(), signal.SIGKILL)


def test_jobs_of_a_process_that_died_wait_again(queue: JobQueue) -> None:
    job, living = add(queue), queue.lock_of("living")
    for attempt in range(1, MOST_ATTEMPTS + 1):
        process = multiprocessing.get_context("spawn").Process(
            target=_claim_and_die, args=(queue.folder,)
        )
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert state_of(queue, job) is State.RUNNING
        ended = queue.take_from_the_dead()
        found = queue.get(job.number)
        assert found is not None and found.attempts == attempt
        assert bool(ended) == (attempt == MOST_ATTEMPTS)
    assert (found.state, found.exit_code) == (State.FAILED, 137)
    assert found.error == f"the process of stage 1 ended {MOST_ATTEMPTS} times"
    living.acquire()
    other = add(queue)
    assert queue.claim([1], "living") is not None
    assert queue.take_from_the_dead() == [] and state_of(queue, other) is State.RUNNING
    living.release()


def test_a_queue_that_cannot_be_written_says_so_and_works_again(
    queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(queue)
    queue._connection.execute("PRAGMA busy_timeout = 50")
    other = sqlite3.connect(queue.folder / job_queue.JOBS_FILE, isolation_level=None)
    for statement in ("BEGIN IMMEDIATE", "BEGIN"):  # a writer; a reader, which holds the COMMIT up
        other.execute(statement)
        other.execute("SELECT * FROM jobs").fetchall()
        with refusal(UnfitEnvironmentError, "the jobs folder", "database is locked"):
            add(queue)
        other.execute("ROLLBACK")
        add(queue)
    assert len(queue.jobs()) == 3
    other.close()


def test_a_stop_is_no_death(queue: JobQueue) -> None:
    job = add(queue)
    for _ in range(MOST_ATTEMPTS + 1):
        assert queue.claim([1], "of no process") is not None
        assert queue.take_from_the_dead(counts=False) == []
    found = queue.get(job.number)
    assert found is not None and (found.state, found.attempts) == (State.WAITING, 0)


def test_what_is_cancelled_while_it_is_given_back_ends(queue: JobQueue) -> None:
    add(queue)
    mine = queue.claim([1], "w")
    assert mine is not None
    queue.cancel(mine.number)
    queue.give_back(mine)
    assert state_of(queue, mine) is State.CANCELLED
    queue.forget(mine.number)
    assert queue.get(mine.number) is None


def test_those_that_have_not_ended_are_not_forgotten(queue: JobQueue) -> None:
    jobs = [add(queue) for _ in range(3)]
    queue.forget(jobs[0].number)
    assert [job.number for job in queue.last(2)] == [jobs[2].number, jobs[1].number]
    assert len(queue.jobs()) == 3


def test_changes_are_seen_by_others(queue: JobQueue) -> None:
    other = JobQueue(queue.folder)
    seen = other.changes()
    assert other.changes() == seen
    add(queue)
    assert other.changes() != seen
    other.close()


def test_many_claim_and_none_twice(tmp_path: Path) -> None:
    folder, claimed, lock = tmp_path / "jobs", list[int](), threading.Lock()
    queue = JobQueue(folder)
    for _ in range(40):
        queue.add(Path("run"), STEPS[:1])

    def work(name: str) -> None:
        own = JobQueue(folder)
        while (job := own.claim([1], name)) is not None:
            with lock:
                claimed.append(job.number)
            own.hand_on(job)
        own.close()

    threads = [threading.Thread(target=work, args=(f"w{k}",)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == [*range(1, 41)]
    assert len(queue.jobs(State.DONE)) == 40


def test_jobs_that_are_alike_are_taken_at_once(queue: JobQueue) -> None:
    likeness = [Likeness("a", 1, 20), Likeness("a", 1, 30), None, Likeness("b", 1, 20)]
    likeness += [Likeness("a", 1, 22)]
    jobs = [add(queue, likeness=each) for each in likeness]
    first = queue.claim([1], "w")
    assert first is not None and first.likeness == likeness[0]
    assert queue.count_alike(first) == 2
    # Those whose steps are nearest come first.
    assert [job.number for job in queue.claim_alike(first, 1, "w")] == [jobs[4].number]
    assert [job.number for job in queue.claim_alike(first, 9, "w")] == [jobs[1].number]
    assert queue.claim_alike(first, 9, "w") == [] and queue.count_alike(first) == 0
    running = queue.jobs(State.RUNNING)
    assert [job.number for job in running] == [jobs[k].number for k in (0, 1, 4)]
    queue.take_from_the_dead()
    again = queue.claim([1], "w")
    # A process has died at them, perhaps at one of them: each is done alone.
    assert again is not None and again.number == first.number and again.attempts == 1
    assert queue.count_alike(again) == 0 and queue.claim_alike(again, 9, "w") == []
    other = queue.claim([1], "w")
    assert other is not None and queue.claim_alike(other, 9, "w") == []


def test_what_is_accepted_is_on_the_disk(queue: JobQueue) -> None:
    add(queue)
    (mode,) = queue._connection.execute("PRAGMA journal_mode").fetchone()
    (synchronous,) = queue._connection.execute("PRAGMA synchronous").fetchone()
    assert (mode, synchronous) == ("delete", 2)  # which is FULL
    with sqlite3.connect(queue.folder / job_queue.JOBS_FILE) as other:
        assert other.execute("SELECT count(*) FROM jobs").fetchone() == (1,)
    assert queue.folder.stat().st_mode & 0o777 == 0o700


def test_folders_that_are_of_no_use(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with refusal(UnfitEnvironmentError, "the jobs folder", "cannot be used"):
        JobQueue(tmp_path / "file")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / job_queue.JOBS_FILE).write_text("no database" * 100)
    with refusal(UnfitEnvironmentError, "cannot be used", "not a database"):
        JobQueue(tmp_path / "bad")
    JobQueue(tmp_path / "other").close()
    with sqlite3.connect(tmp_path / "other" / job_queue.JOBS_FILE) as other:
        other.execute("PRAGMA user_version = 1")
    with refusal(UnfitEnvironmentError, "is of another version of this program: choose another"):
        JobQueue(tmp_path / "other")


def test_a_second_queue_of_a_process_takes_no_locks_from_the_first(queue: JobQueue) -> None:
    """A process that closes a file loses its locks there, which SQLite's transactions have."""
    with queue._change():
        opening = threading.Thread(target=lambda: JobQueue(queue.folder).close())
        opening.start()
        time.sleep(0.5)  # it waits for this transaction by now
        program = (
            "import sqlite3, sys\n"
            "other = sqlite3.connect(sys.argv[1], timeout=0, isolation_level=None)\n"
            "other.execute('BEGIN IMMEDIATE')\n"
        )
        path = queue.folder / job_queue.JOBS_FILE
        result = subprocess.run([sys.executable, "-c", program, path], capture_output=True)
        assert b"database is locked" in result.stderr
    opening.join(60)
    assert not opening.is_alive()
