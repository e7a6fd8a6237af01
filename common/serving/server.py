"""`run_all.sh --serve`: the processes of the stages, and an HTTP server in front of them."""

import ipaddress
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from filelock import FileLock, Timeout

from common.errors import BadSettingError, UnfitEnvironmentError
from common.messages import say
from common.runs.generation import read_run_settings
from common.serving.catalog import Catalog
from common.serving.http_app import make_app
from common.serving.said import SAID_FOLDER
from common.serving.service import Bounds, Service
from common.serving.stage_processes import GROUPS, StageProcesses, flags_of_processes
from common.serving.warm import SERVER_LOCK, announced
from common.stopping import STOP_SIGNALS

SECONDS_BETWEEN_LOOKS = 0.2
SECONDS_TO_ANSWER = 10.0  # those who wait, when it is to end


def serve(
    jobs_dir: Path,
    flags: Mapping[str, Any],
    *,
    host: str,
    port: int,
    api_key: str | None,
    max_wait_ms: int = 0,
    folders: Mapping[str, Path | None] | None = None,
) -> int:
    """Serve until a signal to stop comes. Returns its exit code.

    Args:
        flags: of every run, as `run_all.sh` takes them.
        port: 0: one that is free.
        max_wait_ms: for jobs that can be denoised at once.
        folders: `models_dir` and others of `Catalog`, of what requests may name.

    Raises:
        BadSettingError: the address is open to others and there is no key, or it cannot be used.
        UnfitEnvironmentError: another server has the jobs folder, or a stage does not start.
    """
    refuse_open_address(host, api_key)
    catalog = Catalog(own_model=model_name(flags), **(folders or {}))
    catalog.check(flags)
    jobs_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = FileLock(jobs_dir / SERVER_LOCK, timeout=1)  # some look whether it is held
    try:
        lock.acquire()
    except Timeout:
        raise UnfitEnvironmentError(
            f"another server has the jobs folder {jobs_dir}: choose another --output_dir"
        ) from None
    try:
        with listening(host, port) as listener:
            return _serve(jobs_dir, flags, listener, api_key, max_wait_ms, catalog)
    finally:
        lock.release()


def _serve(
    jobs_dir: Path,
    flags: Mapping[str, Any],
    listener: socket.socket,
    api_key: str | None,
    max_wait_ms: int,
    catalog: Catalog,
) -> int:
    shutil.rmtree(jobs_dir / SAID_FOLDER, ignore_errors=True)  # of programs that were killed
    began = time.time()
    arguments = [*flags_of_processes(flags), f"--max_wait_ms={max_wait_ms}"]
    if "batch_size" in flags:
        arguments.append(f"--batch_size={flags['batch_size']}")
    with StageProcesses(jobs_dir, GROUPS, arguments) as processes, ExitStack() as told:
        service = Service(jobs_dir, flags, Bounds())
        app = make_app(service, catalog, api_key, processes.are_ready)
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=int(SECONDS_TO_ANSWER),
        )
        server, failed = _Server(config), list[Exception]()
        host, port = listener.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host

        def look_after() -> None:
            is_told = False
            while not server.should_exit:
                try:
                    processes.see_to_them()
                    if not is_told and processes.are_ready():
                        is_told = True
                        told.enter_context(announced(jobs_dir, flags, began))
                        say(f"ready: http://{host}:{port}")
                except Exception as error:  # without this thread nobody would see to anything
                    failed.append(error)
                if processes.stopped_by is not None or failed:
                    service.ends = True
                    server.should_exit = True
                time.sleep(SECONDS_BETWEEN_LOOKS)

        looking = threading.Thread(target=look_after)
        looking.start()
        try:
            server.run(sockets=[listener])
        finally:
            server.should_exit = True
            looking.join()
            service.close()
        if failed:
            raise failed[0]
    stopped_by = processes.stopped_by
    return 0 if stopped_by is None else STOP_SIGNALS[stopped_by][1]


def model_name(flags: Mapping[str, Any]) -> str:
    """What requests call the checkpoint: its name, of a folder elsewhere the last part alone.

    Args:
        flags: of every run.
    """
    own = {name: flags[name] for name in ("model_id",) if name in flags}
    model = read_run_settings(flags.get("config"), own).model_id
    return Path(model).name if Path(model).expanduser().is_absolute() else model


class _Server(uvicorn.Server):
    """uvicorn's, which leaves signals to the processes' handler."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def refuse_open_address(host: str, api_key: str | None) -> None:
    """Raise `BadSettingError` where others can reach the server and it asks for no key."""
    try:
        is_local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_local = host == "localhost"
    if not is_local and not api_key:
        raise BadSettingError(
            f"--host {host}: others can reach it: give --api_key, such as "
            f"{secrets.token_urlsafe(24)}, or leave --host out"
        )


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens there.

    Raises:
        BadSettingError: the address is of no use.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        found = socket.create_server((host, port), family=family)
    except (OSError, OverflowError, UnicodeError) as error:
        said = getattr(error, "strerror", None) or str(error)
        raise BadSettingError(
            f"--host {host} --port {port} cannot be used ({said}): choose another"
        ) from None
    with found:
        yield found
