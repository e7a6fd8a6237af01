"""The queue of jobs for processes on several hosts: one keeps its file, the others ask that.

SQLite's file and the locks of processes hold on one machine alone. An actor of Ray has the queue on
its node's disk, and others call it by its name. Whether a process lives is Ray's to know: each that
serves stages has an actor of its own, which ends with it.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from common.errors import StageError, UnfitEnvironmentError, in_one_line
from common.scale.ray_pools import on_node
from common.serving.job_queue import WORKERS_FOLDER, JobQueue
from common.serving.jobs import Job

NAMESPACE = "staged-diffusion"
SECONDS_TO_ANSWER = 60.0
SECONDS_TO_BE_KNOWN = 60.0  # since a keeper began, of processes that served before


class Keeper(JobQueue):
    """The queue, on the node whose disk has it: an actor."""

    def __init__(self, folder: str, most_waiting: int) -> None:
        super().__init__(Path(folder), most_waiting=most_waiting)
        self._serving: dict[str, Any] = {}
        self._since = time.monotonic()

    def ask(
        self, name: str, arguments: tuple[Any, ...], more: dict[str, Any]
    ) -> tuple[Any, type[StageError] | None]:
        """What a method gives and no error, or the sentence and the class of its error."""
        try:
            return getattr(self, name)(*arguments, **more), None
        except StageError as error:
            return str(error), type(error)

    def changes(self) -> int:
        """A number that is another one when anyone has changed the file."""
        return int(1000 * self._since) + self._connection.total_changes

    def serves(self, worker: str, alive: Any) -> None:
        """A process serves stages, for as long as its actor lives."""
        self._serving[worker] = alive

    def _lives(self, worker: str) -> bool:
        alive = self._serving.get(worker)
        if alive is None:  # it will say so, if it is one of before
            return time.monotonic() - self._since < SECONDS_TO_BE_KNOWN
        try:
            ray.get(alive.is_alive.remote(), timeout=SECONDS_TO_ANSWER)
        except RayActorError:
            del self._serving[worker]
            return False
        except GetTimeoutError:  # of a busy node; Ray says when it is gone
            pass
        return True


class Alive:
    """An actor that ends with the process that made it."""

    def is_alive(self) -> bool:
        """Where it can answer."""
        return True


class _Serving:
    """In place of a lock that a process holds while it serves."""

    def __init__(self, queue: "RemoteQueue", worker: str) -> None:
        self._queue, self._worker = queue, worker
        self.lock_file = str(queue.folder / WORKERS_FOLDER / f"{worker}.lock")

    def acquire(self) -> None:
        here = on_node(ray.get_runtime_context().get_node_id())
        alive = ray.remote(num_cpus=0, scheduling_strategy=here)(Alive).remote()
        self._queue.serving = (self._worker, alive)
        self._queue.say_who_serves()

    def release(self) -> None:
        self._queue.serving = None  # with whose last handle the actor goes


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
        address, name = place.split()
        self.folder = folder
        self.serving: tuple[str, Any] | None = None  # this process, and the actor of it
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
            self._keeper = ray.get_actor(name, namespace=NAMESPACE)
        except (ValueError, ConnectionError, RuntimeError) as error:
            raise UnfitEnvironmentError(
                f"the queue of {folder} cannot be reached ({in_one_line(error)})"
            ) from None

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_") or not hasattr(JobQueue, name):
            raise AttributeError(name)
        return partial(self._ask, name)

    def _ask(self, name: str, *arguments: Any, **more: Any) -> Any:
        try:
            answer = self._keeper.ask.remote(name, arguments, more)
            found, error = ray.get(answer, timeout=SECONDS_TO_ANSWER)
        except (RayError, GetTimeoutError) as gone:  # it is begun again
            raise UnfitEnvironmentError(
                f"the queue of {self.folder} does not answer ({in_one_line(gone)})"
            ) from None
        if error is not None:
            raise error(found)
        return found

    def take_from_the_dead(self, *, counts: bool = True) -> list[Job]:
        """Let jobs wait again whose process is no more (`JobQueue.take_from_the_dead`)."""
        self.say_who_serves()
        found: list[Job] = self._ask("take_from_the_dead", counts=counts)
        return found

    def say_who_serves(self) -> None:
        """Tell the keeper of this process; one that was begun again knows nobody."""
        if self.serving is not None:
            self._keeper.serves.remote(*self.serving)

    def lock_of(self, worker: str) -> _Serving:
        """Held by a process that serves for as long as it lives."""
        return _Serving(self, worker)

    def close(self) -> None:
        """Others ask on."""


def keep_queue(jobs_dir: Path, queue_dir: Path, *, node: str, most_waiting: int) -> str:
    """Have the queue of a jobs folder kept on a node, unless it is.

    Returns its place, for `RemoteQueue`.
    """
    name = f"queue of {jobs_dir}".replace(" ", "_")
    ray.remote(Keeper).options(
        name=name,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        max_restarts=-1,
        scheduling_strategy=on_node(node),
    ).remote(str(queue_dir), most_waiting)
    return f"{ray.get_runtime_context().gcs_address} {name}"


def end_keeping(place: str) -> None:
    """End a keeper; its file stays."""
    ray.kill(ray.get_actor(place.split()[1], namespace=NAMESPACE))
