"""The HTTP server as replicas of Ray Serve, each with processes of the stages: they share a queue.

Any of them takes any job, and answers for all: what one accepted is done, and told, by those that
live.
"""

import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus

from common.errors import BadSettingError, UnfitEnvironmentError, in_one_line
from common.messages import warn
from common.scale.ray_pools import Pool, chips_of_hosts, free_of
from common.scale.remote_queue import end_keeping, keep_queue
from common.serving.http_app import make_app
from common.serving.job_queue import REMOTE_QUEUE
from common.serving.server import catalog_of, listening, processes_for
from common.serving.service import Bounds, Service
from common.serving.stage_processes import StageProcesses
from common.stopping import StopRequest

NAME = "pictures"  # of the application and its deployment
SECONDS_BETWEEN_LOOKS = 0.2
SECONDS_UNTIL_SAID = 60.0  # what replicas wait for
SECONDS_TO_OPEN = 1800.0  # the stages: a checkpoint may be read over a network
SECONDS_TO_DRAIN = 600.0  # in which a replica that is to go answers what it has
SECONDS_OF_EVENTS = 60.0  # of a stream, which a replica that is to go waits for


@dataclass(frozen=True, kw_only=True)
class Serving:
    """What all replicas serve."""

    jobs_dir: str
    queue_dir: str | None = None  # of the head node, whose disk has the queue for several hosts
    flags: Mapping[str, Any]  # of every run, as `run_all.sh` takes them
    api_key: str | None = None
    kept: int | None = None  # jobs that have ended
    of_processes: Mapping[str, Any]
    folder: str = field(default_factory=os.getcwd)  # that paths of flags begin in
    folders: Mapping[str, Path | None]  # as `catalog_of` takes them


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """How many replicas there are."""

    least: int = 1
    most: int = 1
    waiting: int = 8  # requests for each; where more wait there are to be more replicas
    host_chips: str | None = None  # as `chips_of_hosts` takes them

    def check(self) -> None:
        """Raise `BadSettingError` where there cannot be so many."""
        if self.most < self.least:
            raise BadSettingError(
                f"--min_replicas {self.least} is more than --max_replicas {self.most}: give fewer"
            )


class Replica:
    """One of the servers."""

    def __init__(self, serving: Serving) -> None:
        """
        Raises:
            StageError: the stages cannot be opened.
        """
        groups, arguments = processes_for(serving.flags, serving.of_processes)
        jobs_dir = Path(serving.jobs_dir)
        if Path(serving.folder).is_dir():
            os.chdir(serving.folder)
        if serving.queue_dir is not None:
            os.environ[REMOTE_QUEUE] = place_of(serving)
        elif ray.get_runtime_context().get_node_id() != head_node():
            raise UnfitEnvironmentError(
                "a replica is on another host than the queue: give --queue_dir, a folder of the "
                "head node's, and an --output_dir that all hosts have"
            )
        self._serving = serving
        self._failed: Exception | None = None
        self._processes = StageProcesses(jobs_dir, groups, arguments)
        bounds = Bounds(kept=serving.kept, events_seconds=SECONDS_OF_EVENTS)
        self._service = Service(jobs_dir, serving.flags, bounds)
        self._ends = threading.Event()
        self._processes.start()
        until = time.monotonic() + SECONDS_TO_OPEN
        while not self._processes.are_ready():
            self._processes.see_to_them()
            if time.monotonic() > until:
                raise UnfitEnvironmentError(f"no stage opened in {SECONDS_TO_OPEN:.0f} s")
            time.sleep(SECONDS_BETWEEN_LOOKS)
        self._looking = threading.Thread(target=self._look_after, daemon=True)
        self._looking.start()

    def __serve_build_asgi_app__(self) -> Any:
        """The application, as Serve asks for it."""
        serving = self._serving
        catalog = catalog_of(serving.flags, serving.folders)
        return make_app(self._service, catalog, serving.api_key, self._processes.are_ready)

    def _look_after(self) -> None:
        while not self._ends.wait(SECONDS_BETWEEN_LOOKS):
            try:
                self._processes.see_to_them()
            except Exception as error:  # which ends this replica: Serve begins another one
                self._failed = error
                return

    def check_health(self) -> None:
        """Raise what keeps the stages from being served."""
        if self._failed is not None:
            raise self._failed

    def __del__(self) -> None:
        """End, once Serve has waited for the requests: what runs goes on elsewhere."""
        self._ends.set()
        self._service.ends = True
        self._processes.stop()
        self._service.close()


def head_node() -> str:
    """The id of the node that the cluster began with."""
    is_head = "node:__internal_head__"
    return str(next(n["NodeID"] for n in ray.nodes() if n["Alive"] and is_head in n["Resources"]))


def place_of(serving: Serving) -> str:
    """Where the queue is kept, which it is from now on."""
    assert serving.queue_dir is not None
    jobs_dir, queue_dir = Path(serving.jobs_dir), Path(serving.queue_dir)
    return keep_queue(jobs_dir, queue_dir, node=head_node(), most_waiting=Bounds().waiting)


def application_of(serving: Serving, scaling: Scaling) -> serve.Application:
    """The application, for a cluster that was joined: a replica on each host that has chips."""
    deployment = serve.deployment(
        name=NAME,
        ray_actor_options=pool_of(scaling).options(),
        autoscaling_config={
            "min_replicas": scaling.least,
            "max_replicas": scaling.most,
            "target_ongoing_requests": scaling.waiting,
        },
        max_ongoing_requests=Bounds().requests,
        graceful_shutdown_timeout_s=SECONDS_TO_DRAIN,
        health_check_period_s=2.0,
    )
    found: serve.Application = deployment(serve.ingress()(Replica)).bind(serving)
    return found


def pool_of(scaling: Scaling) -> Pool:
    """The replicas that there are at least, and what each asks its node for."""
    resource, chips = chips_of_hosts(scaling.host_chips)
    return Pool("a replica", scaling.least, 1 if resource is None else 0, resource, chips)


@contextmanager
def served(
    serving: Serving, scaling: Scaling, *, host: str, port: int
) -> Iterator[tuple[str, int]]:
    """Within the block this cluster has the application; the block is given its address.

    At the end replicas answer what they have. What else Serve has in the cluster stays.

    Args:
        port: of each node; 0: one that is free here.

    Raises:
        BadSettingError: the address is of no use, or Serve has another one in this cluster.
        UnfitEnvironmentError: there can be no such application, or there is one.
    """
    began, (host, port) = _address(host, port)
    if NAME in serve.status().applications:
        raise UnfitEnvironmentError(
            f"this cluster serves {NAME} already: end the program that does, or remove it (serve "
            "shutdown)"
        )
    application = application_of(serving, scaling)
    queue = None if serving.queue_dir is None else place_of(serving)
    try:
        with _telling():
            if began:
                serve.start(http_options={"host": host, "port": port, "location": "EveryNode"})
            target = serve.RunTarget(application, NAME, "/")
            serve.run_many([target], wait_for_applications_running=False)
        yield host, port
    finally:
        with suppress(RayError, RayServeException):  # the cluster is gone, and they with it
            _wait_until_gone()
            if began and not serve.status().applications:
                serve.shutdown()
        if queue is not None:
            end_keeping(queue)


def _address(host: str, port: int) -> tuple[bool, tuple[str, int]]:
    """Whether Serve is to begin, and where it answers."""
    running = _get_global_client(raise_if_no_controller_running=False)
    if running is None:
        with listening(host, port) as listener:
            return True, (host, listener.getsockname()[1])
    own = running.http_config
    if (own.host, own.port) != (host, port):
        raise BadSettingError(
            f"--host {host} --port {port}: Serve answers at {own.host}, port {own.port} in this "
            "cluster already: give that, or end it (serve shutdown)"
        )
    return False, (host, port)


@contextmanager
def _telling() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, TimeoutError, RayError) as error:
        raise UnfitEnvironmentError(
            f"the application does not begin ({in_one_line(error)}): --debug shows more"
        ) from None


def wait_until_it_answers(scaling: Scaling, stop: StopRequest) -> bool:
    """Wait until the application answers, and say each minute what it waits for.

    Returns whether it does; not where a signal to stop came first.

    Raises:
        UnfitEnvironmentError: its replicas cannot begin.
    """
    began = said_at = time.monotonic()
    while stop.number is None:
        with _telling():
            told = serve.status().applications.get(NAME)
        if told is None or told.status is ApplicationStatus.DEPLOY_FAILED:
            why = "it was removed" if told is None else in_one_line(RuntimeError(told.message))
            raise UnfitEnvironmentError(
                f"the application does not begin ({why}): --debug shows more"
            )
        if told.status is ApplicationStatus.RUNNING:
            return True
        if time.monotonic() - said_at > SECONDS_UNTIL_SAID:
            said_at = time.monotonic()
            own = pool_of(scaling)
            warn(f"no answer for {said_at - began:.0f} s: {own.said()} begin; {free_of([own])}")
        time.sleep(SECONDS_BETWEEN_LOOKS)
    return False


def _wait_until_gone() -> None:
    """Remove the application; its replicas answer what they have."""
    until = time.monotonic() + SECONDS_TO_DRAIN
    while time.monotonic() < until:
        try:
            serve.delete(NAME)
            return
        except TimeoutError:  # of a minute
            continue
