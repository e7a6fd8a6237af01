"""The queue of jobs for processes on several hosts: one keeps its file, the others ask that.

SQLite's file and the locks of processes hold on one machine alone. An actor of Ray has the queue on
its node's disk, and others call it by its name. Whether a process lives is Ray's to know: each that
serves stages has an actor of its name, which ends with it. An answer may come late or get lost,
where the actor is begun again: what was asked is asked again, so that each change can be made twice
and is made once.
"""

import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from common.errors import BadSettingError, StageError, UnfitEnvironmentError, in_one_line
from common.scale.ray_pools import on_node
from common.serving.job_queue import WORKERS_FOLDER, JobQueue
from common.serving.jobs import Job, State, Step

NAMESPACE = "staged-diffusion"
Told = tuple[str, type[StageError]]  # an error's sentence, and its class
SECONDS_TO_ANSWER = 60.0
SECONDS_UNTIL_ASKED_AGAIN = 0.5  # a keeper that is begun again
SECONDS_BETWEEN_CHANGES = 0.1  # a keeper is asked for them, whoever looks how often


class Keeper(JobQueue):
    """The queue, on the node whose disk has it: an actor."""

    def __init__(self, folder: str, most_waiting: int) -> None:
        self.folder, self._most = Path(folder), most_waiting
        self._since = time.monotonic()
        self._is_open = False
        self.open()

    def open(self) -> Told | None:
        """Open the file, unless it is. Returns why it cannot be; it may be later."""
        if not self._is_open:
            try:
                super().__init__(self.folder, most_waiting=self._most)
            except StageError as error:  # which Ray would tell as one of its own
                return str(error), type(error)
            self._is_open = True
        return None

    def kept_in(self) -> str:
        """Its folder."""
        return str(self.folder)

    def ask(
        self, name: str, arguments: tuple[Any, ...], more: dict[str, Any]
    ) -> tuple[Any, type[StageError] | None]:
        """What a method gives and no error, or the sentence and the class of its error."""
        if (unfit := self.open()) is not None:
            return unfit
        try:
            return getattr(self, name)(*arguments, **more), None
        except StageError as error:
            return str(error), type(error)

    def changes(self) -> int:
        """A number that is another one when anyone has changed the file."""
        return int(1000 * self._since) + self._connection.total_changes

    def claim(self, stages: Sequence[int], worker: str) -> Job | None:
        """Take the next job (`JobQueue.claim`): one whose claim's answer got lost, before others.

        For who claims has none, as far as it knows.
        """
        query = "SELECT * FROM jobs WHERE state = ? AND worker = ? ORDER BY number LIMIT 1"
        lost = self._all(query, State.RUNNING, worker)
        return lost[0] if lost else super().claim(stages, worker)

    def withdraw(self, run_dir: Path) -> None:
        """Forget a job that nobody was told of; one that runs ends."""
        if self.open() is None:
            with self._change() as change:
                of_it = str(run_dir), State.WAITING
                change("DELETE FROM jobs WHERE run_dir = ? AND state = ?", *of_it)
                change("UPDATE jobs SET cancel_asked = 1, key = NULL WHERE run_dir = ?", of_it[0])

    def _lives(self, worker: str) -> bool:
        try:
            ray.get_actor(worker, namespace=NAMESPACE)
        except ValueError:
            return False
        return True


class Alive:
    """An actor that ends with the process that made it."""

    def is_alive(self) -> bool:
        """Where it can answer."""
        return True


class _Serving:
    """In place of a lock that a process holds while it serves."""

    def __init__(self, folder: Path, worker: str) -> None:
        self._worker = worker
        self._alive: Any = None
        self.lock_file = str(folder / WORKERS_FOLDER / f"{worker}.lock")

    def acquire(self) -> None:
        here = on_node(ray.get_runtime_context().get_node_id())
        # Begun again where it ends by itself: its name is there for as long as its process.
        alive = ray.remote(num_cpus=0, scheduling_strategy=here, max_restarts=-1)(Alive)
        self._alive = alive.options(name=self._worker, namespace=NAMESPACE).remote()
        ray.get(self._alive.is_alive.remote())

    def release(self) -> None:
        ray.kill(self._alive)


class RemoteQueue:
    """`JobQueue`, where a keeper has it."""

    def __init__(self, folder: Path, place: str) -> None:
        """
        Args:
            folder: the jobs folder, which all hosts have.
            place: the cluster's address and the keeper's name, as `keep_queue` gives it.

        Raises:
            UnfitEnvironmentError: there is no such keeper.
        """
        address, self._name = place.split()
        self.folder = folder
        self._changes, self._asked_at = -1, 0.0
        (folder / WORKERS_FOLDER).mkdir(parents=True, exist_ok=True)
        try:
            if not ray.is_initialized():
                ray.init(
                    address=address,
                    namespace=NAMESPACE,
                    log_to_driver=False,
                    logging_level="error",
                    configure_logging=False,
                )
            self._keeper = ray.get_actor(self._name, namespace=NAMESPACE)
        except (ValueError, ConnectionError, RuntimeError) as error:
            raise UnfitEnvironmentError(
                f"the queue of {folder} cannot be reached ({in_one_line(error)})"
            ) from None

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_") or not hasattr(JobQueue, name):
            raise AttributeError(name)
        return partial(self._ask, name)

    def _ask(self, name: str, *arguments: Any, **more: Any) -> Any:
        until = time.monotonic() + SECONDS_TO_ANSWER
        while True:
            try:
                answer = self._keeper.ask.remote(name, arguments, more)
                left = max(0.0, until - time.monotonic())
                found, error = ray.get(answer, timeout=left)
                break
            except (RayError, GetTimeoutError) as gone:
                again = isinstance(gone, RayActorError)  # it is begun again
                if not again or time.monotonic() + SECONDS_UNTIL_ASKED_AGAIN > until:
                    raise UnfitEnvironmentError(
                        f"the queue of {self.folder} does not answer ({in_one_line(gone)})"
                    ) from None
                time.sleep(SECONDS_UNTIL_ASKED_AGAIN)
                with suppress(ValueError):  # another one may be there meanwhile
                    self._keeper = ray.get_actor(self._name, namespace=NAMESPACE)
        if error is not None:
            raise error(found)
        return found

    def add(
        self, run_dir: Path, steps: Sequence[Step], *, key: str | None = None, **more: Any
    ) -> Job:
        """Accept a job (`JobQueue.add`); where no answer comes it is withdrawn, or cancelled."""
        own = key or f"once-{secrets.token_hex(16)}"
        try:
            found: Job = self._ask("add", run_dir, steps, key=own, **more)
        except UnfitEnvironmentError:
            self._keeper.withdraw.remote(run_dir)  # which comes after what was asked before
            raise
        return found

    def changes(self) -> int:
        """A number that is another one when anyone has changed the file, or a moment later."""
        if time.monotonic() - self._asked_at > SECONDS_BETWEEN_CHANGES:
            self._changes, self._asked_at = self._ask("changes"), time.monotonic()
        return self._changes

    def lock_of(self, worker: str) -> _Serving:
        """Held by a process that serves for as long as it lives."""
        return _Serving(self.folder, worker)

    def close(self) -> None:
        """Others ask on."""


def keep_queue(jobs_dir: Path, queue_dir: Path, *, node: str, most_waiting: int) -> str:
    """Have the queue of a jobs folder kept on a node, unless it is.

    Returns its place, for `RemoteQueue`.

    Raises:
        BadSettingError: it is kept in another folder, or that is on a network file system.
        UnfitEnvironmentError: it cannot be kept there.
    """
    name = f"queue of {jobs_dir}".replace(" ", "_")
    was_there = _is_kept(name)
    keeper = (
        ray.remote(Keeper)
        .options(
            name=name,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
            scheduling_strategy=on_node(node),
        )
        .remote(str(queue_dir), most_waiting)
    )
    try:
        asked = [keeper.kept_in.remote(), keeper.open.remote()]
        folder, unfit = ray.get(asked, timeout=SECONDS_TO_ANSWER)
    except (RayError, GetTimeoutError) as error:
        raise UnfitEnvironmentError(
            f"the queue of {jobs_dir} cannot be kept ({in_one_line(error)})"
        ) from None
    place = f"{ray.get_runtime_context().gcs_address} {name}"
    if unfit is not None and not was_there:
        end_keeping(place)
        said, kind = unfit
        raise kind(f"--queue_dir {queue_dir}: {said}")
    if folder != str(queue_dir):
        raise BadSettingError(
            f"--queue_dir {queue_dir}: the queue of {jobs_dir} is in {folder} in this cluster: "
            "give that, or end what serves it"
        )
    return place


def _is_kept(name: str) -> bool:
    try:
        ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return False
    return True


def end_keeping(place: str) -> None:
    """End a keeper, where it is there; its file stays."""
    with suppress(ValueError, RayError):
        ray.kill(ray.get_actor(place.split()[1], namespace=NAMESPACE))
