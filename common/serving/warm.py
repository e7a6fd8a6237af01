"""`run_all.sh` where a server is warm: its stages run what is asked for, by the same flags.

A server says in the user's cache folder that it is there. Its stages write the same files as
processes of their own, in the same run directory; what they print is printed here.
"""

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, TextIO

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict

from common import private_cache
from common.errors import UnfitEnvironmentError
from common.files.run_lock import HELD_BY_PARENT
from common.files.stage_table import Stage
from common.messages import say, warn
from common.models.model_settings import PROJECT_DIR
from common.runs.in_turn import run_in_turn
from common.serving.job_queue import SECONDS_BETWEEN_LOOKS, JobQueue
from common.serving.jobs import Caller, Job, State, Step
from common.serving.said import SaidByStages
from common.serving.stage_processes import flags_of_processes
from common.stopping import STOP_SIGNALS, heard_signals
from common.whole_files import remove_file, write_text_whole

SERVERS_FOLDER = "servers"  # of the user's cache folder
SERVER_LOCK = "server.lock"  # of a jobs folder; held by its server
SECONDS_BETWEEN_LOOKS_AT_THE_SERVER = 1.0
# Of an environment, what programs are computed by.
COMPUTED_BY = (
    *("JAX_", "XLA_", "TPU_", "LIBTPU", "PJRT_", "CUDA_", "NVIDIA_", "OMP_", "MKL_", "LD_"),
    *("HF_HOME", "HF_HUB_", "HF_ENDPOINT", "HF_TOKEN", "XDG_CACHE_HOME", "PYTHONPATH"),
)
# What is measured is measured alone, and these are of a process.
NOT_SERVED = (
    *("debug", "repeat", "profile", "profile_dir", "profile_steps", "topology", "offline"),
    *("distributed", "stream", "wait", "progress"),
    "remote_vae",  # which may be this very server, and wait for itself
)


class _Server(BaseModel):
    """What a server says of itself."""

    model_config = ConfigDict(extra="forbid")

    jobs_dir: Path
    project: Path
    since: float  # when its processes were begun
    processes: list[str]  # flags that decided how stages were opened
    host: str
    environment: str  # a hash of what of it programs are computed by


@contextmanager
def announced(jobs_dir: Path, flags: Mapping[str, Any], since: float) -> Iterator[None]:
    """Within the block other programs of this user may use the server.

    Args:
        flags: of every run, as `run_all.sh` takes them.
        since: when its processes were begun.
    """
    own = _Server(
        jobs_dir=jobs_dir.resolve(),
        project=PROJECT_DIR,
        since=since,
        processes=flags_of_processes(flags),
        host=socket.gethostname(),
        environment=_computed_by(),
    )
    path: Path | None = None
    try:
        # One for each jobs folder: what a killed server has left there is of its successor.
        name = sha256(f"{own.host} {own.jobs_dir}".encode()).hexdigest()[:16]
        path = private_cache.folder() / SERVERS_FOLDER / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        write_text_whole(path, own.model_dump_json())
    except (OSError, UnfitEnvironmentError) as error:
        warn(f"run_all.sh does not find this server ({error})")
    try:
        yield
    finally:
        if path is not None:
            with suppress(OSError, UnfitEnvironmentError):
                remove_file(path)


def _computed_by() -> str:
    found = [pair for pair in sorted(os.environ.items()) if pair[0].startswith(COMPUTED_BY)]
    return sha256(repr(found).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class WarmServer:
    """A server that serves what this process would."""

    jobs_dir: Path

    def run_in_turn(
        self,
        commands: Mapping[Stage, list[str]],
        libraries: dict[str, list[str]] | None,
        settled: Path | None = None,
        *,
        stream: Path | None = None,
    ) -> int:
        """As `run_in_turn` of `common.runs`; where the server ends, by processes of their own."""
        chosen = {s: c for s, c in commands.items() if settled is not None or not s.of_pictures}
        code = self._run(chosen, settled)
        if code is not None:
            return code
        say("  the stages go on as processes of their own")
        return run_in_turn(commands, libraries, settled, stream=stream)

    def _run(self, commands: Mapping[Stage, list[str]], settled: Path | None) -> int | None:
        """Have stages run. Returns the exit code, or None where nobody runs them."""
        steps = [Step(stage.number, command[2:]) for stage, command in commands.items()]
        caller = Caller(os.fspath(Path.cwd()), os.environ.get(HELD_BY_PARENT, ""))
        folder, received = Path.cwd() if settled is None else settled.resolve(), list[int]()
        try:
            queue = JobQueue(self.jobs_dir)
            job = queue.add(folder, steps, priority=1, caller=caller)
        except UnfitEnvironmentError as error:  # a full disk, a queue that is full
            warn(f"the server takes no job: {error}")
            return None
        before = {n: signal.signal(n, lambda n, _: received.append(n)) for n in heard_signals()}
        try:
            job, is_left = _follow(queue, job, received)
            queue.forget(job.number)
            if is_left and job.state is State.CANCELLED and not received:
                say("  the server is no more")
                return None
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            queue.close()
        if job.error:
            print(f"error: {job.error}", file=sys.stderr, flush=True)
        if job.exit_code is None or (received and job.exit_code == 0):
            # Where nothing was received, somebody has cancelled it at the server.
            return STOP_SIGNALS[received[0] if received else signal.SIGINT][1]
        return job.exit_code


def _follow(queue: JobQueue, job: Job, received: list[int]) -> tuple[Job, bool]:
    """Print what stages print for a job until it has ended.

    Returns it, and whether its server is no more, so that it was cancelled here.
    """
    is_asked, is_left, told = False, False, False
    with SaidByStages(queue.folder, job).reading() as files:
        while not job.has_ended:
            seen, until = queue.changes(), time.monotonic() + SECONDS_BETWEEN_LOOKS_AT_THE_SERVER
            while queue.changes() == seen and time.monotonic() < until:
                _print(files)
                if received and not is_asked:
                    queue.cancel(job.number)
                    is_asked = True
                if len(received) > 1:  # at once; the stage ends when it has heard
                    return job, False
                time.sleep(SECONDS_BETWEEN_LOOKS)
            job = queue.get(job.number) or replace(job, state=State.FAILED, exit_code=1)
            if (
                job.state is State.WAITING
                and job.place == 0
                and time.monotonic() > until
                and not told
            ):
                say("  waits for the server, which is at another job")
                told = True
            if time.monotonic() > until and not is_held(queue.folder / SERVER_LOCK):
                is_left = True
                queue.cancel(job.number)
                queue.take_from_the_dead(counts=False)
        _print(files)
    return job, is_left


def _print(files: Mapping[str, TextIO]) -> None:
    for name, file in files.items():
        if text := file.read():
            stream = getattr(sys, name)
            stream.write(text)
            stream.flush()


def is_held(path: Path) -> bool:
    """Whether a process holds a lock."""
    if not path.exists():
        return False
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        return True
    except OSError:
        return False
    lock.release()
    return False


def find_warm(given: Mapping[str, Any]) -> WarmServer | None:
    """A server of this checkout, user and environment for a run by some flags, or None.

    Args:
        given: flags, as `run_all.sh` takes them.
    """
    if any(name in given for name in NOT_SERVED):
        return None
    with suppress(OSError, UnfitEnvironmentError):
        for path in sorted((private_cache.folder() / SERVERS_FOLDER).glob("*.json")):
            try:
                server = _Server.model_validate(json.loads(path.read_text("utf-8")))
            except (OSError, ValueError):
                continue  # it ends just now, or is of another version
            if server.host != socket.gethostname():  # whose home is the same
                continue
            if not is_held(server.jobs_dir / SERVER_LOCK):
                remove_file(path)
                continue
            if (
                server.project == PROJECT_DIR
                and server.processes == flags_of_processes(given)
                and server.environment == _computed_by()
            ):
                if _code_is_newer(server.since):
                    say(f"the server of {server.jobs_dir} began before the code changed: not used")
                    continue
                return WarmServer(jobs_dir=server.jobs_dir)
    return None


def _code_is_newer(since: float) -> bool:
    files = (path for name in ("common", "stages") for path in (PROJECT_DIR / name).rglob("*.py"))
    return any(path.stat().st_mtime > since for path in files)
