"""A job: a run directory, and the stages that are to run in it, one after the other."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple


class State(StrEnum):
    """Of a job."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


ENDED = (State.DONE, State.FAILED, State.CANCELLED)


class Step(NamedTuple):
    """A stage that is to run for a job."""

    stage: int
    arguments: list[str]


class Likeness(NamedTuple):
    """By what a job may be done at once with others."""

    alike: str  # the same of jobs that one program most likely serves
    images: int  # of each
    evaluations: int  # about so many; those that are near each other lose the least


class Caller(NamedTuple):
    """A program beside the server that waits for a job, whose flags are meant as it reads them."""

    folder: str  # its working directory
    locked: str  # the run directory whose lock it holds, or none


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job as it is now."""

    number: int
    key: str | None  # of the request that it is for: the same one makes no second job
    run_dir: Path
    steps: list[Step]
    place: int  # among the steps: which one's turn it is
    state: State
    priority: int  # those with more come first
    attempts: int  # that ended with the process
    worker: str | None  # which runs it
    caller: Caller | None  # None: a request
    likeness: Likeness | None  # None: it is done alone
    cancel_asked: bool
    exit_code: int | None
    error: str
    accepted_at: float  # seconds since the epoch, as the other times
    began_at: float | None
    ended_at: float | None

    @property
    def step(self) -> Step:
        """Whose turn it is."""
        return self.steps[self.place]

    @property
    def has_ended(self) -> bool:
        """Whether nothing is to come."""
        return self.state in ENDED


VERSION = 2  # of the table
SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    key TEXT UNIQUE,
    run_dir TEXT NOT NULL,
    steps TEXT NOT NULL,
    place INTEGER NOT NULL DEFAULT 0,
    stage INTEGER,
    state TEXT NOT NULL,
    priority INTEGER NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    worker TEXT,
    caller TEXT,
    alike TEXT,
    images INTEGER NOT NULL DEFAULT 0,
    evaluations INTEGER NOT NULL DEFAULT 0,
    cancel_asked INTEGER NOT NULL DEFAULT 0,
    exit_code INTEGER,
    error TEXT NOT NULL DEFAULT '',
    accepted_at REAL NOT NULL,
    began_at REAL,
    ended_at REAL
);
CREATE INDEX IF NOT EXISTS folders ON jobs (run_dir);
CREATE INDEX IF NOT EXISTS times ON jobs (accepted_at);
CREATE INDEX IF NOT EXISTS ends ON jobs (ended_at);
CREATE INDEX IF NOT EXISTS waiting ON jobs (state, stage, priority DESC, number);
"""


def job_of(row: Mapping[str, Any]) -> Job:
    """A job as the queue's table has it."""
    values = dict(row)
    del values["stage"]
    likeness = Likeness(*(values.pop(name) for name in Likeness._fields))
    return Job(
        **values
        | {
            "run_dir": Path(values["run_dir"]),
            "steps": [Step(*step) for step in json.loads(values["steps"])],
            "caller": None if values["caller"] is None else Caller(*json.loads(values["caller"])),
            "likeness": None if likeness.alike is None else likeness,
            "state": State(values["state"]),
            "cancel_asked": bool(values["cancel_asked"]),
        }
    )
