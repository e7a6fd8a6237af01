"""What a server accepts as jobs: bounds, run directories, the wait for what comes of them."""

import asyncio
import re
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from common.errors import BadInputFileError, BadSettingError, UnfitEnvironmentError
from common.files.recipe import to_json
from common.files.stage_table import ENCODE_PICTURES
from common.runs.generation import RunSettings, read_run_settings
from common.runs.in_turn import plan
from common.sampling.sampling_settings import SamplingSettings
from common.serving.job_queue import open_queue
from common.serving.jobs import ENDED, Job, Likeness, State, Step
from common.serving.live import LIVE_FOLDER, Live, read_live, remove_live
from common.serving.metrics import Metrics
from common.serving.request_pictures import pixels_of
from common.serving.stages import Run

RUNS_FOLDER = "runs"  # of the jobs folder: a run directory for each job
GIVEN_FOLDER = "given"  # of a run directory: the pictures that came with the request
SECONDS_BETWEEN_LOOKS = 0.01  # while somebody waits
SECONDS_BETWEEN_FORGETTING = 0.2
MOST_FORGOTTEN = 20  # at once, so that the server can end in between
SECONDS_UNTIL_FORGOTTEN = 60.0  # since a job's end, in which its pictures are fetched
MOST_LISTED = 100  # jobs
# Flags that may be given again: those of every run, and those of a request.
OF_ALL_AND_ONE = {"lora", "embedding"}
SECONDS_OF_RETRIES = 30.0  # that a client lets pass at most before it asks again
# What may be another for each image that one program denoises.
OF_EACH_IMAGE = {
    *("prompt", "prompt_2", "negative_prompt", "negative_prompt_2", "seed", "scheduler"),
    *("num_inference_steps", "guidance_scale", "guidance_rescale", "strength", "image_format"),
}
STEPS: int = SamplingSettings.model_fields["num_inference_steps"].default
Answer = TypeVar("Answer")
_PATH = re.compile(r"(?<![\w.])/(?:[^\s/:'\"]+/)*([^\s/:'\"]+)")


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What a request may ask for, and all of them at once."""

    pixels: int = 2048 * 2048  # of a picture
    given_pixels: int = 4096 * 4096  # of one that a request gives
    steps: int = 150
    images: int = 10
    body_bytes: int = 32_000_000
    body_seconds: float = 300.0  # in which it has to be there
    waiting: int = 1000  # jobs
    # Of those that have ended longer than a minute ago, with their run directories; None: all.
    kept: int | None = None
    # Of all requests that are being answered.
    requests: int = 500
    held_bytes: int = 256_000_000  # of their bodies
    # Of a stream of events, which who listens asks for again; None: as long as there are any.
    events_seconds: float | None = None


class ShuttingDownError(UnfitEnvironmentError):
    """The server ends; what it has accepted waits for the next one."""


class JobFailedError(Exception):
    """A job ended without its pictures."""

    def __init__(self, job: Job) -> None:
        self.status = 400 if job.exit_code == 2 else 500
        is_cancelled = job.state is State.CANCELLED
        said = "the job was cancelled" if is_cancelled else without_paths(job.error)
        super().__init__(said)


class Service:
    """Jobs for an event loop: the queue's file is touched by a thread of its own alone."""

    def __init__(
        self, jobs_dir: Path, flags: Mapping[str, Any], bounds: Bounds | None = None
    ) -> None:
        """
        Args:
            flags: of every run, as `run_all.sh` takes them.
        """
        self.bounds, self.flags = bounds or Bounds(), dict(flags)
        self._jobs_dir = jobs_dir
        self._runs = jobs_dir.resolve() / RUNS_FOLDER
        for folder in (self._runs, jobs_dir / LIVE_FOLDER):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._thread = ThreadPoolExecutor(1, "jobs")
        waiting = self.bounds.waiting
        self._queue = self._thread.submit(open_queue, jobs_dir, most_waiting=waiting).result()
        self._waiting: dict[int, list[asyncio.Future[Job]]] = {}  # by their jobs' numbers
        self._is_to_look = False
        self._metrics, self._counted_to = Metrics(), time.time()
        self._counting = asyncio.Lock()
        self.ends = False  # and answers those who wait

    async def _ask(self, function: Callable[..., Answer], *arguments: Any, **more: Any) -> Answer:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, lambda: function(*arguments, **more))

    async def submit(
        self,
        flags: Mapping[str, Any],
        *,
        pictures: Mapping[str, bytes] | None = None,
        key: str | None = None,
    ) -> Job:
        """Accept a job; when this returns it is on the disk.

        Args:
            flags: of this run, as `run_all.sh` takes them.
            pictures: flag, such as `image` → an encoded picture that stands for its file.
            key: of the request; the same one makes no second job.

        Raises:
            BadSettingError: over the bounds, flags that no stage takes, or a damaged picture.
            QueueFullError: too many wait.
        """
        if self.ends:
            raise ShuttingDownError("the server is shutting down: try again later")
        given = {**self.flags, **{k: v for k, v in flags.items() if v is not None}}
        for name in OF_ALL_AND_ONE & given.keys():
            given[name] = [*self.flags.get(name, ()), *flags.get(name, ())]
        run_dir = self._runs / secrets.token_hex(8)
        try:
            kept, size = await asyncio.to_thread(self._keep_pictures, run_dir, pictures or {})
            self._refuse_too_much({**size, **given})  # a run has its picture's size, or its own
            commands = plan({**given, **kept, "output_dir": run_dir})
            if not kept and "config" not in given:  # no pictures to encode
                del commands[ENCODE_PICTURES]
            steps = [Step(stage.number, command[2:]) for stage, command in commands.items()]
            likeness = likeness_of(given, pictures or {})
            job = await self._ask(self._queue.add, run_dir, steps, key=key, likeness=likeness)
        except Exception:  # cancelled, the job may have been accepted all the same
            shutil.rmtree(run_dir, ignore_errors=True)
            raise
        if job.run_dir != run_dir:  # of the same request, before
            shutil.rmtree(run_dir, ignore_errors=True)
        return job

    async def submit_own(self, prepare: Callable[[Path, Mapping[str, Any]], Sequence[Step]]) -> Job:
        """Accept a job that is no run of the stages.

        Args:
            prepare: is given a run directory that is not there yet and the flags of every run,
                writes what the job needs, and returns its steps.

        Raises:
            QueueFullError: too many wait.
        """
        if self.ends:
            raise ShuttingDownError("the server is shutting down: try again later")
        run_dir = self._runs / secrets.token_hex(8)
        try:
            steps = await asyncio.to_thread(prepare, run_dir, self.flags)
            return await self._ask(self._queue.add, run_dir, steps)
        except Exception:  # cancelled, the job may have been accepted all the same
            shutil.rmtree(run_dir, ignore_errors=True)
            raise

    def _keep_pictures(
        self, run_dir: Path, pictures: Mapping[str, bytes]
    ) -> tuple[dict[str, list[str]], dict[str, int]]:
        """Write pictures to a run directory.

        Returns the flags that name them, and the height and width of the one to begin with.
        """
        kept, size = {}, {}
        for flag, data in pictures.items():
            path = run_dir / GIVEN_FOLDER / flag
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            height, width, _ = pixels_of(data, flag, self.bounds.given_pixels).shape
            if flag == "image":
                size = {"height": height, "width": width}
            kept[flag] = [str(path)]
        return kept, size

    def _refuse_too_much(self, given: Mapping[str, Any]) -> None:
        sides = [given.get(name) for name in ("height", "width")]
        pixels = (sides[0] or sides[1] or 0) * (sides[1] or sides[0] or 0)
        asked = {
            "pixels": pixels,
            "steps": given.get("num_inference_steps") or 0,
            "images": given.get("num_images_per_prompt") or 0,
        }
        for name, value in asked.items():
            most = getattr(self.bounds, name)
            if value > most:
                raise BadSettingError(f"{value} {name} are more than the {most} that are allowed")

    async def find(self, name: str) -> Job | None:
        """The job whose run directory has a name."""
        if not re.fullmatch(r"[0-9a-f]{16}", name):
            return None
        return await self._ask(self._queue.find, self._runs / name)

    async def last_of(self, key: str, seconds: float) -> Job | None:
        """The last job of the last seconds whose key begins so.

        One that ended a while ago was answered, and is no retry's.
        """
        found = await self._ask(self._queue.last_of, key, time.time() - seconds)
        if found is not None and time.time() - (found.ended_at or time.time()) > SECONDS_OF_RETRIES:
            return None
        return found

    async def jobs(self) -> list[Job]:
        """The last ones, the last one first."""
        return await self._ask(self._queue.last, MOST_LISTED)

    async def unfinished(self) -> list[Job]:
        """Those of requests that run or wait, in the order in which they were accepted."""
        found = await self._ask(self._queue.jobs, State.WAITING, State.RUNNING)
        return [job for job in found if job.caller is None]

    async def ended_since(self, time: float) -> list[Job]:
        """Those of requests that have ended after a time."""
        return await self._ask(self._queue.ended_since, time)

    async def metrics(self) -> bytes:
        """What Prometheus reads; of what has ended since the server began."""
        await self._count()
        return self._metrics.text(await self._ask(self._queue.counts))

    async def _count(self) -> None:
        async with self._counting:
            ended = await self.ended_since(self._counted_to)
            await asyncio.to_thread(self._metrics.count, ended)
            self._counted_to = max([self._counted_to, *(job.ended_at or 0 for job in ended)])

    def defaults(self) -> dict[str, Any]:
        """The settings of a run that asks for none."""
        own = {n: v for n, v in self.flags.items() if n in RunSettings.model_fields}
        return read_run_settings(self.flags.get("config"), own).model_dump(mode="json")

    async def live(self, job: Job) -> Live | None:
        """How far a job is; None where it does not run, or has only begun to."""
        if job.state is not State.RUNNING:
            return None
        return await asyncio.to_thread(read_live, self._jobs_dir, job.run_dir.name, job.step.stage)

    async def forget(self, job: Job) -> None:
        """Let go of a job that has ended, and of its run directory."""
        remove_live(self._jobs_dir, job.run_dir.name)
        await self._ask(self._queue.forget, job.number)
        if await self._ask(self._queue.get, job.number) is not None:
            return  # it runs still
        self._is_to_look = True
        await asyncio.to_thread(shutil.rmtree, job.run_dir, ignore_errors=True)

    async def forget_old(self) -> None:
        """Let go of jobs that have ended, where not all are kept."""
        while self.bounds.kept is not None and not self.ends:
            with suppress(UnfitEnvironmentError):  # it may pass
                before, kept = time.time() - SECONDS_UNTIL_FORGOTTEN, self.bounds.kept
                ended = self._queue.ended_before
                old = await self._ask(ended, before, but_last=kept, most=MOST_FORGOTTEN)
                if old:
                    await self._count()  # which reads their reports
                for job in old:
                    await self.forget(job)
            await asyncio.sleep(SECONDS_BETWEEN_FORGETTING)

    async def cancel(self, job: Job) -> None:
        """Ask that a job ends."""
        await self._ask(self._queue.cancel, job.number)
        self._is_to_look = True  # `watch` sees what others change

    async def wait_for(self, job: Job) -> Job:
        """A job once it has ended.

        Raises:
            ShuttingDownError: the server ends before that.
        """
        future: asyncio.Future[Job] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(job.number, []).append(future)
        self._is_to_look = True  # it may have ended before
        try:
            if self.ends:  # nobody would tell
                raise ShuttingDownError("")
            return await future
        except ShuttingDownError:
            raise ShuttingDownError(
                f"the server is shutting down: job {job.run_dir.name} is kept, and goes on when "
                "it is back"
            ) from None
        finally:
            self._waiting[job.number].remove(future)
            if not self._waiting[job.number]:
                del self._waiting[job.number]

    async def pictures_of(self, job: Job) -> list[Path]:
        """The pictures' files of a job, once it is done.

        Raises:
            JobFailedError: it ends without them.
            BadInputFileError: somebody has removed them.
            ShuttingDownError: the server ends before that.
        """
        job = await self.wait_for(job)
        if job.exit_code != 0:
            raise JobFailedError(job)
        files = await asyncio.to_thread(pictures_of, job)
        if not files:
            raise BadInputFileError(f"the pictures of job {job.run_dir.name} are gone: ask again")
        return files

    async def watch(self) -> None:
        """Tell those who wait when their jobs have ended; for as long as the server runs.

        One look at the queue serves all of them.
        """
        seen = -1
        while not self.ends:
            if self._waiting:
                try:
                    version = await self._ask(self._queue.changes)
                    if version != seen or self._is_to_look:
                        seen, self._is_to_look = version, False
                        await self._tell_those_who_wait()
                except UnfitEnvironmentError:  # it may pass
                    self._is_to_look = True
            await asyncio.sleep(SECONDS_BETWEEN_LOOKS)
        for future in [each for own in self._waiting.values() for each in own]:
            if not future.done():
                future.set_exception(ShuttingDownError(""))

    async def _tell_those_who_wait(self) -> None:
        numbers = [*self._waiting]  # others may come while the queue is asked
        states = await self._ask(self._queue.states, numbers)
        for number in numbers:
            if (state := states.get(number)) is not None and state not in ENDED:
                continue
            job = None if state is None else await self._ask(self._queue.get, number)
            for future in self._waiting.get(number, []):
                if future.done():
                    continue
                if job is None:
                    future.set_exception(BadSettingError("the job was removed: ask again"))
                else:
                    future.set_result(job)

    def close(self) -> None:
        """Let go of the queue."""
        self._thread.submit(self._queue.close)
        self._thread.shutdown()


def likeness_of(given: Mapping[str, Any], pictures: Collection[str]) -> Likeness:
    """By what a request's job may be denoised at once with others.

    Args:
        given: flags of the run, without its run directory.
        pictures: the names of those that it begins with.
    """
    alike = {name: given[name] for name in sorted(given.keys() - OF_EACH_IMAGE)}
    return Likeness(
        to_json({"flags": alike, "pictures": sorted(pictures)}),
        given.get("num_images_per_prompt") or 1,
        given.get("num_inference_steps") or STEPS,
    )


def pictures_of(job: Job) -> list[Path]:
    """The pictures' files of a job that is done."""
    return Run(job.run_dir).files


def without_paths(sentence: str) -> str:
    """A sentence that tells no folders of this machine: of paths their last part."""
    return _PATH.sub(r"\1", sentence)
