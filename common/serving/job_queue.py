"""Jobs that wait for stages, in one SQLite file of a jobs folder: what is accepted is on the disk.

A job is a run directory and the stages that are to run in it, one after the other. Whoever serves a
stage claims a job whose turn that stage is, works, and hands it on. Every change is a transaction
that begins as a writer (`BEGIN IMMEDIATE`), with a rollback journal and `synchronous=FULL`: before
3.51.3 SQLite can lose commits of several writers on a WAL file, and a transaction that becomes a
writer later fails at once where another one was faster (https://www.sqlite.org/wal.html).
"""

import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from filelock import FileLock, Timeout

from common.errors import UnfitEnvironmentError
from common.serving.jobs import (
    ENDED,
    SCHEMA,
    VERSION,
    Caller,
    Job,
    Likeness,
    State,
    Step,
    job_of,
)
from common.serving.local_disks import make_own_file, refuse_network_file_system

JOBS_FILE = "jobs.sqlite3"
WORKERS_FOLDER = "workers"  # a lock for each process that serves stages
# In the environment of such a process: who started it, without whom it is to end.
STARTED_BY = "STAGED_DIFFUSION_STARTED_BY"
REMOTE_QUEUE = "STAGED_DIFFUSION_QUEUE"  # where another host keeps the queue, as it names it
MOST_ATTEMPTS = 5  # of a job whose stage's process dies at it
SECONDS_TO_WAIT_FOR_A_WRITER = 30.0
SECONDS_BETWEEN_LOOKS = 0.01

_ARE_ALIKE = "state = ? AND stage = ? AND alike = ? AND attempts = 0"


class QueueFullError(UnfitEnvironmentError):
    """As many jobs wait as may."""


class JobQueue:
    """The jobs of a folder, for one thread of a process."""

    def __init__(self, folder: Path, *, most_waiting: int = 10_000) -> None:
        """
        Args:
            folder: made where it is not there, readable by its owner alone.
            most_waiting: jobs that have not ended; further ones are refused.

        Raises:
            BadSettingError: the folder is on a network file system.
            UnfitEnvironmentError: it cannot be written.
        """
        self.folder, self._most = folder, most_waiting
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            (folder / WORKERS_FOLDER).mkdir(exist_ok=True)
            refuse_network_file_system(folder)
            make_own_file(folder / JOBS_FILE)  # it has prompts
            self._connection = sqlite3.connect(
                folder / JOBS_FILE, timeout=SECONDS_TO_WAIT_FOR_A_WRITER, isolation_level=None
            )
            self._connection.row_factory = sqlite3.Row
            self._connection.execute("PRAGMA journal_mode = DELETE")
            self._connection.execute("PRAGMA synchronous = FULL")
            self._refuse_other_version()
            with self._change() as change:
                for statement in SCHEMA.split(";"):
                    change(statement)
                change(f"PRAGMA user_version = {VERSION}")
        except (OSError, sqlite3.Error) as error:
            raise UnfitEnvironmentError(
                f"the jobs folder {folder} cannot be used ({error}): choose another, or free it"
            ) from None

    def _refuse_other_version(self) -> None:
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        (tables,) = self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if tables and version != VERSION:
            raise UnfitEnvironmentError(
                f"the jobs folder {self.folder} is of another version of this program: choose "
                "another one, or remove it"
            )

    def close(self) -> None:
        """Let go of the file."""
        self._connection.close()

    @contextmanager
    def _change(self) -> Iterator[Callable[..., Any]]:
        """A transaction; the block is given a function that executes a statement."""
        with self._told():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield lambda statement, *values: self._connection.execute(statement, values)
                self._connection.execute("COMMIT")
            finally:
                if self._connection.in_transaction:
                    with suppress(sqlite3.Error):
                        self._connection.execute("ROLLBACK")

    @contextmanager
    def _told(self) -> Iterator[None]:
        """What SQLite refuses in the block is an error of ours."""
        try:
            yield
        except sqlite3.Error as error:
            raise UnfitEnvironmentError(
                f"the jobs folder {self.folder} cannot be used ({error}): free its disk, or end "
                "what holds it"
            ) from None

    # --- who asks -------------------------------------------------------------------------------

    def add(
        self,
        run_dir: Path,
        steps: Sequence[Step],
        *,
        priority: int = 0,
        key: str | None = None,
        caller: Caller | None = None,
        likeness: Likeness | None = None,
    ) -> Job:
        """Accept a job; when this returns it is on the disk.

        Args:
            key: of the request; a job that has it already is returned in place of a second one.

        Raises:
            QueueFullError: too many wait.
        """
        with self._change() as change:
            known = None if key is None else change("SELECT * FROM jobs WHERE key = ?", key)
            if known is not None and (row := known.fetchone()) is not None:
                return job_of(row)
            (waiting,) = change(
                "SELECT count(*) FROM jobs WHERE state IN (?, ?)", State.WAITING, State.RUNNING
            ).fetchone()
            if waiting >= self._most:
                raise QueueFullError(f"{waiting} jobs wait, as many as may: try again later")
            row = change(
                "INSERT INTO jobs "
                "(key, run_dir, steps, stage, state, priority, caller, alike, images, "
                "evaluations, accepted_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) RETURNING *",
                *(key, os.fspath(run_dir), json.dumps(steps), steps[0].stage, State.WAITING),
                *(priority, None if caller is None else json.dumps(caller)),
                *(likeness or (None, 0, 0)),
                time.time(),
            ).fetchone()
        return job_of(row)

    def get(self, number: int) -> Job | None:
        """A job by its number."""
        return next(iter(self._all("SELECT * FROM jobs WHERE number = ?", number)), None)

    def find(self, run_dir: Path) -> Job | None:
        """The job of a run directory."""
        query = "SELECT * FROM jobs WHERE run_dir = ?"
        return next(iter(self._all(query, os.fspath(run_dir))), None)

    def last_of(self, key: str, since: float) -> Job | None:
        """The last job that was accepted since a time, and whose key begins so."""
        query = (
            "SELECT * FROM jobs WHERE accepted_at >= ? AND substr(key, 1, ?) = ? "
            "ORDER BY number DESC LIMIT 1"
        )
        return next(iter(self._all(query, since, len(key), key)), None)

    def jobs(self, *states: State) -> list[Job]:
        """Those in some states, or all, in the order in which they were accepted."""
        chosen = states or tuple(State)
        marks = ", ".join("?" * len(chosen))
        return self._all(f"SELECT * FROM jobs WHERE state IN ({marks}) ORDER BY number", *chosen)

    def last(self, most: int) -> list[Job]:
        """The last jobs of requests that were accepted, the last one first."""
        query = "SELECT * FROM jobs WHERE caller IS NULL ORDER BY number DESC LIMIT ?"
        return self._all(query, most)

    def ended_since(self, time: float) -> list[Job]:
        """Those of requests that have ended after a time, in the order in which they did."""
        query = "SELECT * FROM jobs WHERE ended_at > ? AND caller IS NULL ORDER BY ended_at"
        return self._all(query, time)

    def ended_before(self, time: float, *, but_last: int, most: int) -> list[Job]:
        """Those of requests that ended before a time and are not the last ones that did.

        Args:
            but_last: so many of all that have ended are left out.
            most: of those that are given.
        """
        query = (
            "SELECT * FROM (SELECT * FROM jobs WHERE ended_at IS NOT NULL AND caller IS NULL "
            "ORDER BY ended_at DESC LIMIT -1 OFFSET ?) WHERE ended_at < ? LIMIT ?"
        )
        return self._all(query, but_last, time, most)

    def _all(self, query: str, *values: Any) -> list[Job]:
        with self._told():
            return [job_of(row) for row in self._connection.execute(query, values)]

    def states(self, numbers: Sequence[int]) -> dict[int, State]:
        """Those of some jobs; one that is no more has none."""
        query = "SELECT number, state FROM jobs WHERE number IN (SELECT value FROM json_each(?))"
        with self._told():
            rows = self._connection.execute(query, (json.dumps(numbers),))
            return {number: State(state) for number, state in rows}

    def counts(self) -> dict[State, int]:
        """How many jobs are in a state."""
        query = "SELECT state, count(*) FROM jobs GROUP BY state"
        with self._told():
            return {State(state): count for state, count in self._connection.execute(query)}

    def forget(self, number: int) -> bool:
        """Let go of a job that has ended; its run directory is the caller's.

        Returns whether it had, and is no more.
        """
        with self._change() as change:
            gone = change(
                f"DELETE FROM jobs WHERE number = ? AND state IN ({', '.join('?' * len(ENDED))})",
                *(number, *ENDED),
            )
            return bool(gone.rowcount)

    def cancel(self, number: int) -> None:
        """Ask that a job ends: one that waits ends now, one that runs when its stage hears it."""
        with self._change() as change:
            change("UPDATE jobs SET cancel_asked = 1 WHERE number = ?", number)
            change(
                "UPDATE jobs SET state = ?, stage = NULL, ended_at = ? "
                "WHERE number = ? AND state = ?",
                *(State.CANCELLED, time.time(), number, State.WAITING),
            )

    def changes(self) -> int:
        """A number that is another one when another connection has changed the file."""
        with self._told():
            (version,) = self._connection.execute("PRAGMA data_version").fetchone()
        return int(version)

    # --- who serves -----------------------------------------------------------------------------

    def claim(self, stages: Sequence[int], worker: str) -> Job | None:
        """Take the next job whose turn one of some stages is; None where none waits."""
        marks = ", ".join("?" * len(stages))
        with self._change() as change:
            row = change(
                "UPDATE jobs SET state = ?, worker = ?, began_at = coalesce(began_at, ?) "
                "WHERE number = (SELECT number FROM jobs WHERE state = ? AND stage IN "
                f"({marks}) ORDER BY priority DESC, number LIMIT 1) RETURNING *",
                *(State.RUNNING, worker, time.time(), State.WAITING, *stages),
            ).fetchone()
        return None if row is None else job_of(row)

    def claim_alike(self, job: Job, most: int, worker: str) -> list[Job]:
        """Take other jobs that wait for the same stage as one that was taken, and are like it.

        Those that no process has died at, so that one which ends processes ends alone.

        Args:
            most: of them.
        """
        if job.likeness is None or job.attempts:
            return []
        with self._change() as change:
            rows = change(
                "UPDATE jobs SET state = ?, worker = ?, began_at = coalesce(began_at, ?) "
                f"WHERE number IN (SELECT number FROM jobs WHERE {_ARE_ALIKE} "
                "ORDER BY abs(evaluations - ?), number LIMIT ?) RETURNING *",
                *(State.RUNNING, worker, time.time(), State.WAITING, job.step.stage),
                *(job.likeness.alike, job.likeness.evaluations, most),
            ).fetchall()
        return sorted(map(job_of, rows), key=lambda each: each.number)

    def count_alike(self, job: Job) -> int:
        """How many jobs wait that `claim_alike` would take."""
        if job.likeness is None or job.attempts:
            return 0
        values = State.WAITING, job.step.stage, job.likeness.alike
        with self._told():
            query = f"SELECT count(*) FROM jobs WHERE {_ARE_ALIKE}"
            return int(self._connection.execute(query, values).fetchone()[0])

    def hand_on(self, job: Job) -> None:
        """A step is done: the next one's turn has come, or all is done."""
        place = job.place + 1
        is_last = place == len(job.steps)
        following = State.DONE if is_last else State.WAITING
        stage = None if is_last else job.steps[place].stage
        ended_at, code = (time.time(), 0) if is_last else (None, None)
        with self._change() as change:
            change(
                "UPDATE jobs SET place = ?, stage = ?, state = ?, worker = NULL, attempts = 0, "
                "ended_at = ?, exit_code = ? WHERE number = ? AND worker = ?",
                *(job.place if is_last else place, stage, following),
                *(ended_at, code, job.number, job.worker),
            )
            _cancel_if_asked(change, job)

    def end(self, job: Job, code: int, error: str) -> None:
        """A step has failed, or was cancelled."""
        with self._change() as change:
            change(
                "UPDATE jobs SET state = CASE WHEN cancel_asked = 1 THEN ? ELSE ? END, "
                "stage = NULL, worker = NULL, exit_code = ?, error = ?, ended_at = ? "
                "WHERE number = ? AND worker = ?",
                *(State.CANCELLED, State.FAILED, code, error, time.time()),
                *(job.number, job.worker),
            )

    def give_back(self, job: Job) -> None:
        """Let another process go on with a job from what this one has kept."""
        with self._change() as change:
            change(
                "UPDATE jobs SET state = ?, worker = NULL WHERE number = ? AND worker = ?",
                *(State.WAITING, job.number, job.worker),
            )
            _cancel_if_asked(change, job)

    def take_from_the_dead(self, *, counts: bool = True) -> list[Job]:
        """Let jobs wait again whose process is no more; one that has met that often fails.

        Returns those that ended so.

        Args:
            counts: False where processes were stopped.
        """
        workers = {job.worker for job in self.jobs(State.RUNNING)}
        dead = [worker for worker in workers if worker is not None and not self._lives(worker)]
        ended: list[Job] = []
        for worker in dead:
            with self._change() as change:
                rows = change(
                    "UPDATE jobs SET attempts = attempts + ?, worker = NULL, "
                    "state = CASE WHEN cancel_asked = 1 THEN ? WHEN attempts + ? >= ? THEN ? "
                    "ELSE ? END WHERE worker = ? AND state = ? RETURNING *",
                    *(int(counts), State.CANCELLED, int(counts), MOST_ATTEMPTS, State.FAILED),
                    *(State.WAITING, worker, State.RUNNING),
                ).fetchall()
                for job in map(job_of, rows):
                    if job.state is State.WAITING:
                        continue
                    error = f"the process of stage {job.step.stage} ended {job.attempts} times"
                    change(
                        "UPDATE jobs SET stage = NULL, exit_code = 137, error = ?, ended_at = ? "
                        "WHERE number = ?",
                        *(error, time.time(), job.number),
                    )
                    ended.append(job)
        return ended

    def lock_of(self, worker: str) -> FileLock:
        """Held by a process that serves for as long as it lives."""
        return FileLock(self.folder / WORKERS_FOLDER / f"{worker}.lock", timeout=0)

    def _lives(self, worker: str) -> bool:
        lock = self.lock_of(worker)
        try:
            lock.acquire()
        except Timeout:
            return True
        Path(lock.lock_file).unlink(missing_ok=True)  # no other process has its name
        lock.release()
        return False


def open_queue(folder: Path, *, most_waiting: int = 10_000) -> JobQueue:
    """The jobs of a folder: here, or where `REMOTE_QUEUE` says that they are kept."""
    if place := os.environ.get(REMOTE_QUEUE):
        remote: JobQueue = resolve_name("common.scale.remote_queue:RemoteQueue")(folder, place)
        return remote
    return JobQueue(folder, most_waiting=most_waiting)


def _cancel_if_asked(change: Callable[..., Any], job: Job) -> None:
    """End a job that nobody runs now, where that was asked for while it ran."""
    change(
        "UPDATE jobs SET state = ?, stage = NULL, ended_at = ? "
        "WHERE number = ? AND cancel_asked = 1 AND state = ?",
        *(State.CANCELLED, time.time(), job.number, State.WAITING),
    )
