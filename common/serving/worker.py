"""A process that serves stages: it opens them once and then does jobs, until it is to stop."""

import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir, contextmanager, suppress
from pathlib import Path
from pkgutil import resolve_name
from types import FrameType
from typing import NamedTuple

from common.compute.backends import TorchBackend
from common.compute.kept import Kept
from common.errors import BadSettingError, StageError, UnfitEnvironmentError
from common.files.run_lock import HELD_BY_PARENT
from common.files.stage_table import DENOISE, LAST, STAGES, Stage, numbered
from common.messages import say, warn
from common.process import run_in_process
from common.progress import watched_by
from common.runs.flags import OF_SERVING, Given
from common.runs.in_turn import begins_with_pictures
from common.runs.stage_run import ResidentStage
from common.sampling.together import Seat, Together
from common.serving import vae_jobs
from common.serving.job_queue import SECONDS_BETWEEN_LOOKS, STARTED_BY, WORKERS_FOLDER, open_queue
from common.serving.jobs import Job
from common.serving.live import LiveWriter, has_listeners, remove_live
from common.serving.preview_fits import PreviewFits
from common.serving.said import SaidByStages
from common.serving.stage_processes import ON_DEVICES
from common.stopping import (
    SECONDS_OF_ONE_SIGNAL,
    STOP_SIGNALS,
    StopRequest,
    ends_this_process,
    heard_signals,
    stop_now,
)
from common.whole_files import remove_file, write_text_whole

SECONDS_BETWEEN_LOOKS_FOR_THE_DEAD = 1.0
SECONDS_BETWEEN_LOOKS_AT_CANCELS = 0.2
SECONDS_UNTIL_RARE = 5.0  # without a job, after which it is looked for less often
SECONDS_BETWEEN_RARE_LOOKS = 0.05
SECONDS_UNTIL_TRIED_AGAIN = 1.0  # where the queue cannot be written
FLAGS = {"serve", *OF_SERVING, "backend", "debug", "batch_size"}


class AtOnce(NamedTuple):
    """How many pictures of different jobs are denoised at once."""

    batch_size: int = 1
    max_wait_ms: int = 0  # for further jobs, where fewer are there


class Worker:
    """Stages that stay in this process, and the jobs that it does with them."""

    def __init__(
        self, jobs_dir: Path, stages: Sequence[Stage], keep: int, at_once: "AtOnce"
    ) -> None:
        """
        Args:
            stages: that it serves.
            keep: checkpoints that stay in memory.
        """
        numbers = "_".join(str(stage.number) for stage in stages)
        # Processes' numbers come again, after a restart of the machine or container.
        self.name = f"{numbers}-{os.getpid()}-{secrets.token_hex(4)}"
        self.stages, self.stop = stages, StopRequest()
        jobs_dir = jobs_dir.resolve()  # from wherever it works later
        self._queue = open_queue(jobs_dir)
        self._lock = self._queue.lock_of(self.name)
        self._says_ready = jobs_dir / WORKERS_FOLDER / f"{self.name}.json"
        # Models of a checkpoint: the text encoders, the UNet, the VAE of its two stages.
        models = {LAST if stage.of_pictures else stage for stage in stages}
        kept = Kept(most_models=keep * len(models))
        self._residents = {stage.number: ResidentStage(stage, kept) for stage in stages}
        self._kept, self._at_once = kept, at_once
        self._beside: list[ResidentStage] = []  # of stage 2, for jobs that are done at once
        self._vae_command = vae_jobs.make_command(kept)
        self._fits = PreviewFits()
        self._heard_at = 0.0  # when the first signal to stop came
        self._parent = os.environ.pop(STARTED_BY, None)

    def serve(self, *arguments: str, chips: str | None = None) -> int:
        """Open the stages and do jobs. Returns the exit code of what stopped it.

        Args:
            arguments: flags of the backend to start.
            chips: that this process has taken (`take_chips`), and jax is to see.

        Raises:
            BadSettingError: there are no such chips.
        """
        before = {number: signal.signal(number, self._hear) for number in heard_signals()}
        self._lock.acquire()
        try:
            self._open(arguments, chips)
            ready = {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "stages": [stage.number for stage in self.stages],
            }
            write_text_whole(self._says_ready, json.dumps(ready))
            say(f"serving {', '.join(stage.name for stage in self.stages)}")
            self._do_jobs()
        finally:
            remove_file(self._says_ready)
            Path(self._lock.lock_file).unlink(missing_ok=True)
            self._lock.release()
            self._queue.close()
            for number, handler in before.items():
                signal.signal(number, handler)
        return 0 if self.stop.number is None else STOP_SIGNALS[self.stop.number][1]

    def _open(self, arguments: Sequence[str], chips: str | None) -> None:
        try:
            for resident in self._residents.values():
                resident.open(*arguments)
        except UnfitEnvironmentError as unfit:
            if chips is None:
                raise
            raise BadSettingError(f"--chips {chips}: {unfit}") from None
        if chips is not None and "common.compute.jax_start" in sys.modules:
            resolve_name("common.compute.jax_start:refuse_other_chips")(chips)

    @ends_this_process
    def _hear(self, number: int, frame: FrameType | None) -> None:
        """Note a signal to stop: what runs is finished where that is kept, else to its end."""
        if (
            self.stop.number is not None
            and time.monotonic() - self._heard_at > SECONDS_OF_ONE_SIGNAL
        ):
            stop_now(number)
        if self.stop.number is None:
            self.stop.number, self._heard_at = number, time.monotonic()
            for resident in (*self._residents.values(), *self._beside):
                resident.stop.number = number

    def _is_orphan(self) -> bool:
        return self._parent is not None and str(os.getppid()) != self._parent

    def _do_jobs(self) -> None:
        numbers = [stage.number for stage in self.stages]
        seen, looked_at = -1, 0.0
        idle_since = time.monotonic()
        while self.stop.number is None and not self._is_orphan():
            now = time.monotonic()
            job = None
            try:
                if now - looked_at > SECONDS_BETWEEN_LOOKS_FOR_THE_DEAD:
                    for ended in self._queue.take_from_the_dead():
                        remove_live(self._queue.folder, ended.run_dir.name)
                    seen, looked_at = -1, now
                if (version := self._queue.changes()) != seen:
                    job = self._queue.claim(numbers, self.name)
                    seen = version
            except UnfitEnvironmentError as unfit:  # a full disk, say, which may pass
                warn(str(unfit))
                time.sleep(SECONDS_UNTIL_TRIED_AGAIN)
            if job is not None:
                if others := self._claim_others(job):
                    self._do_at_once([job, *others])
                else:
                    self._do(job)
                seen, idle_since = -1, time.monotonic()
                continue
            if self._fits.advance():
                continue
            rare = now - idle_since > SECONDS_UNTIL_RARE
            time.sleep(SECONDS_BETWEEN_RARE_LOOKS if rare else SECONDS_BETWEEN_LOOKS)

    def _do(self, job: Job) -> None:
        """A job's step."""
        stage = numbered(job.step.stage)
        try:
            is_needed = (
                vae_jobs.is_vae_job(job.step)
                or not stage.of_pictures
                or begins_with_pictures(job.run_dir)
            )
        except StageError as gone:  # its settings are, or damaged
            said, ending = str(gone), gone.exit_code
            self._write(lambda: self._queue.end(job, ending, said))
            return
        if not is_needed:
            self._write(lambda: self._queue.hand_on(job))
            return
        resident = self._residents[stage.number]
        resident.stop.number = self.stop.number
        ended = threading.Event()
        watching = threading.Thread(target=self._watch_for_cancel, args=(job, resident, ended))
        watching.start()
        try:
            command, arguments = resident.command, job.step.arguments
            if vae_jobs.is_vae_job(job.step):
                command, arguments = self._vae_command, arguments[1:]
            with self._as_caller(job), self._telling_how_far(job, stage):
                code, error = run_in_process(command, arguments, stage.command)
        except OSError as gone:  # the caller's folder is
            code, error = (
                UnfitEnvironmentError.exit_code,
                f"{gone.filename}: {gone.strerror or gone}",
            )
        finally:
            ended.set()
            watching.join()
        self._end(job, code, error)

    def _claim_others(self, job: Job) -> list[Job]:
        """Jobs that are denoised with one that was claimed: with it as many as a power of two."""
        if job.likeness is None or job.step.stage != DENOISE.number:
            return []
        # Groups have powers of two images.
        most = (1 << (self._at_once.batch_size.bit_length() - 1)) // job.likeness.images
        until = time.monotonic() + self._at_once.max_wait_ms / 1000
        with suppress(UnfitEnvironmentError):  # else it is done alone
            while (
                (count := 1 + self._queue.count_alike(job)) < most
                and time.monotonic() < until
                and self.stop.number is None
            ):
                time.sleep(SECONDS_BETWEEN_LOOKS)
            at_once = 1 << (min(count, most).bit_length() - 1) if most > 1 else 1
            if at_once > 1:
                return self._queue.claim_alike(job, at_once - 1, self.name)
        return []

    def _do_at_once(self, jobs: Sequence[Job]) -> None:
        """Stage 2 of several jobs, a thread for each: they wait for each other to denoise."""
        while len(self._beside) < len(jobs):
            self._beside.append(ResidentStage(DENOISE, self._kept))
        failed = (1, "a defect of this program: the job's thread ended")
        ended: dict[int, tuple[int, str | None]] = dict.fromkeys((j.number for j in jobs), failed)

        def run(job: Job, resident: ResidentStage, seat: Seat) -> None:
            resident.seat, resident.stop.number = seat, self.stop.number
            with seat.turn(), self._telling_how_far(job, DENOISE):
                ended[job.number] = run_in_process(
                    resident.command, job.step.arguments, DENOISE.command
                )

        seats = Together(len(jobs)).seats()
        threads = [
            threading.Thread(target=run, args=each)
            for each in zip(jobs, self._beside, seats, strict=False)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for job in jobs:
            self._end(job, *ended[job.number])

    def _end(self, job: Job, code: int, error: str | None) -> None:
        """Say in the queue how a job's step went."""
        if error is not None and job.caller is None:  # else it says so itself
            print(f"error: {error}", file=sys.stderr, flush=True)
        if code == 0:
            self._write(lambda: self._queue.hand_on(job))
        elif self.stop.number is not None and _was_stopped(code):
            self._write(lambda: self._queue.give_back(job))
        else:
            self._write(lambda: self._queue.end(job, code, error or ""))

    @contextmanager
    def _as_caller(self, job: Job) -> Iterator[None]:
        """Within the block this process works where a program does that waits for the job."""
        if job.caller is None:
            yield
            return
        os.environ[HELD_BY_PARENT] = job.caller.locked
        try:
            said = SaidByStages(self._queue.folder, job)
            with chdir(job.caller.folder), said.writing():
                yield
        finally:
            del os.environ[HELD_BY_PARENT]

    @contextmanager
    def _telling_how_far(self, job: Job, stage: Stage) -> Iterator[None]:
        """Within the block who looks at the job sees how far it is."""
        folder = self._queue.folder
        if not has_listeners(folder):
            yield
            return
        weights = self._fits.weights(job.run_dir) if stage is DENOISE else None
        writer = LiveWriter(folder, job.run_dir.name, stage.number, weights)
        try:
            with watched_by(writer):
                yield
        finally:
            writer.end()

    def _write(self, change: Callable[[], None]) -> None:
        """Say how a job went, as soon as the queue can be written: nobody else will."""
        while True:
            try:
                change()
                return
            except UnfitEnvironmentError as error:
                warn(str(error))
                time.sleep(SECONDS_UNTIL_TRIED_AGAIN)

    def _watch_for_cancel(self, job: Job, resident: ResidentStage, ended: threading.Event) -> None:
        """Let what runs end where its job is cancelled."""
        with suppress(UnfitEnvironmentError):  # it is not heard then
            queue = open_queue(self._queue.folder)
            while not ended.wait(SECONDS_BETWEEN_LOOKS_AT_CANCELS):
                now = queue.get(job.number)
                if now is not None and now.cancel_asked:
                    resident.stop.number = signal.SIGINT
                    break
            queue.close()


def serve(given: Given) -> int:
    """Serve the stages that `--serve` names, as a script does. Returns the exit code.

    Raises:
        BadSettingError: no such stages, or no `--jobs_dir`.
    """
    assert given.flags.serve is not None
    if given.flags.jobs_dir is None:
        raise BadSettingError("--serve: give --jobs_dir, where the jobs are, as well")
    for name in given.parameters.keys() - FLAGS:
        raise BadSettingError(f"--{name} does not go with --serve: jobs have flags of their own")
    known = {str(stage.number): stage for stage in STAGES}
    asked = [number.strip() for number in given.flags.serve.split(",")]
    if unknown := [number for number in asked if number not in known]:
        raise BadSettingError(
            f"--serve {given.flags.serve}: there is no stage {unknown[0]!r}: give some of "
            f"{', '.join(known)}"
        )
    stages = [stage for number, stage in known.items() if number in asked]
    if not {*ON_DEVICES} <= {*stages}:
        # Another process may need the same GPU, of whose memory jax takes three quarters.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    arguments = [] if given.options.backend == "auto" else [f"--backend={given.options.backend}"]
    at_once = AtOnce(given.options.batch_size, given.flags.max_wait_ms)
    worker = Worker(given.flags.jobs_dir, stages, given.flags.keep, at_once)
    chips = None if given.options.backend == TorchBackend.name else given.flags.chips
    return worker.serve(*arguments, chips=chips)


def _was_stopped(code: int) -> bool:
    """Whether an exit code is that of a signal to stop."""
    return code in {own for _, own in STOP_SIGNALS.values()}
