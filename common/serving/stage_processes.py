"""The processes that serve stages: started, waited for, begun again where they die, stopped."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

from common.compute.own_chips import check_shares
from common.errors import BadSettingError, StageError, UnfitEnvironmentError
from common.files.stage_table import FIRST, STAGES, Stage
from common.messages import say
from common.runs.in_turn import script_of
from common.serving.job_queue import SECONDS_BETWEEN_LOOKS, STARTED_BY, WORKERS_FOLDER, open_queue
from common.serving.jobs import Job, Step
from common.stopping import STOP_SIGNALS, heard_signals, holding_signals
from common.text_files import parse_json, read_text
from common.whole_files import remove_file

ON_DEVICES = tuple(stage for stage in STAGES if stage is not FIRST)
MOST_STARTS = 5  # of a process that ends before it serves
SECONDS_TO_END = 60.0  # after a signal to stop; then it is killed


def flags_of_processes(given: Mapping[str, Any]) -> list[str]:
    """What of a run's flags decides how its stages are opened."""
    return [f"--backend={given['backend']}"] if "backend" in given else []


class Group(NamedTuple):
    """Stages that are one process."""

    stages: tuple[Stage, ...]
    arguments: tuple[str, ...] = ()  # of this process alone

    @property
    def named(self) -> str:
        return ", ".join([*(stage.name for stage in self.stages), *self.arguments])


def groups_of(chips: Sequence[str] = ()) -> list[Group]:
    """The processes of all stages: those on devices in one, which holds a TPU's chips.

    Args:
        chips: of a process each, as `--chips` takes them; nothing: all of them are one's.

    Raises:
        BadSettingError: they are not shared evenly.
    """
    check_shares(chips)
    sharing = [Group(ON_DEVICES, (f"--chips={own}",)) for own in chips]
    return [Group((FIRST,)), *(sharing or [Group(ON_DEVICES)])]


class StageProcesses:
    """A process for each group of stages, with the queue that they serve.

    Within `with` signals to stop are passed on to them, and end what is waited for.
    """

    def __init__(
        self, jobs_dir: Path, groups: Sequence[Group], arguments: Sequence[str] = ()
    ) -> None:
        """
        Args:
            arguments: further flags of each process.
        """
        self.queue = open_queue(jobs_dir)
        self._jobs_dir, self._arguments = jobs_dir, arguments
        self._processes: dict[Group, subprocess.Popen[bytes]] = {}
        self._starts = dict.fromkeys(groups, 0)
        self._received: list[int] = []

    def __enter__(self) -> Self:
        self._before = {n: signal.signal(n, self._pass_on) for n in heard_signals()}
        self.start()
        return self

    def start(self) -> None:
        """Begin them, for one who sees to it that they end (`stop`)."""
        for group in self._starts:
            self._start(group)

    def __exit__(self, *_: object) -> None:
        self.stop()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self.queue.close()

    @property
    def stopped_by(self) -> int | None:
        """The signal to stop that has come."""
        return self._received[0] if self._received else None

    @property
    def share_chips(self) -> bool:
        """Whether each has a part of the machine's chips."""
        return any(group.arguments for group in self._starts)

    def _pass_on(self, number: int, _: object) -> None:
        self._received.append(number)
        for process in self._processes.values():
            with suppress(ProcessLookupError):
                process.send_signal(number)

    def _start(self, group: Group) -> None:
        numbers = ",".join(str(stage.number) for stage in group.stages)
        command = [sys.executable, script_of(group.stages[-1]), f"--serve={numbers}"]
        arguments = [f"--jobs_dir={self._jobs_dir}", *self._arguments, *group.arguments]
        environment = {**os.environ, STARTED_BY: str(os.getpid())}
        self._starts[group] += 1
        with holding_signals():
            self._processes[group] = subprocess.Popen([*command, *arguments], env=environment)
        if self._received:  # before it was there to be told
            self._processes[group].send_signal(self._received[0])

    def see_to_them(self) -> None:
        """Begin processes again that have died; they take up the jobs of those.

        Raises:
            BadSettingError: one does not take its flags.
            UnfitEnvironmentError: one ends again and again.
        """
        for group, process in list(self._processes.items()):
            if process.poll() is None or self._received:
                continue
            if (said := self._ready_files().get(process.pid)) is not None:  # it has served
                self._starts[group] = 0
                remove_file(said)
            elif process.returncode == BadSettingError.exit_code:  # and would be again
                raise BadSettingError(f"the process of {group.named}: see what it said above")
            if self._starts[group] >= MOST_STARTS:
                raise UnfitEnvironmentError(
                    f"the process of {group.named} ended {MOST_STARTS} times, the last time with "
                    f"{process.returncode}: see what it said above"
                )
            say(f"the process of {group.named} ended with {process.returncode}: it is begun again")
            self._start(group)

    def are_ready(self) -> bool:
        """Whether all of them have opened their stages."""
        said = self._ready_files()
        return all(process.pid in said for process in self._processes.values())

    def _ready_files(self) -> dict[int, Path]:
        """Process → the file by which it says that it serves."""
        found = {}
        for path in (self._jobs_dir / WORKERS_FOLDER).glob("*.json"):
            with suppress(OSError, ValueError, LookupError, TypeError):
                told = parse_json(read_text(path))
                if told["host"] == socket.gethostname():  # else numbers of other processes
                    found[int(told["pid"])] = path
        return found

    def do(self, run_dir: Path, steps: Sequence[Step]) -> tuple[int, str]:
        """Have a job done. Returns its exit code, and its error in words."""
        job = self.queue.add(run_dir, steps)
        while not job.has_ended and not self._received:
            self.see_to_them()
            seen = self.queue.changes()
            job = self._look_at(job)
            until = time.monotonic() + 1.0
            while (
                not (job.has_ended or self._received)
                and self.queue.changes() == seen
                and time.monotonic() < until
            ):
                time.sleep(SECONDS_BETWEEN_LOOKS)
        if self._received and not job.has_ended:
            self.stop()
            job = self._look_at(job)
        if job.exit_code is not None:
            return job.exit_code, job.error
        if not self._received:
            return STOP_SIGNALS[signal.SIGINT][1], "the job was cancelled"
        word, code = STOP_SIGNALS[self._received[0]]
        return code, f"{word}; the same command goes on from what is kept"

    def _look_at(self, job: Job) -> Job:
        found = self.queue.get(job.number)
        if found is None:
            raise StageError(f"{self._jobs_dir}: job {job.number} is no more")
        return found

    def stop(self) -> None:
        """Let all of them end, what runs first where that is kept."""
        for process in self._processes.values():
            if process.poll() is None and not self._received:
                process.terminate()
        until = time.monotonic() + SECONDS_TO_END
        for process in self._processes.values():
            try:
                process.wait(timeout=max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._processes:
            queue = open_queue(self._jobs_dir)  # of this thread
            queue.take_from_the_dead(counts=False)
            queue.close()
