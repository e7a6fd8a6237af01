"""`run_all.sh --serve`: the processes of the stages, and an HTTP server in front of them."""

import ipaddress
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from filelock import FileLock, Timeout

from common.errors import BadSettingError, UnfitEnvironmentError
from common.files.stage_table import FIRST
from common.messages import say
from common.models.find import open_checkpoint
from common.runs.flags import Given
from common.runs.generation import read_run_settings
from common.serving.catalog import Catalog
from common.serving.http_app import make_app
from common.serving.said import SAID_FOLDER
from common.serving.service import Bounds, Service
from common.serving.stage_processes import Group, StageProcesses, flags_of_processes, groups_of
from common.serving.warm import SERVER_LOCK, announced
from common.stopping import STOP_SIGNALS

SECONDS_BETWEEN_LOOKS = 0.2
SECONDS_TO_ANSWER = 10.0  # those who wait, when it is to end


def serve(
    jobs_dir: Path,
    flags: Mapping[str, Any],
    *,
    address: tuple[str, int],
    api_key: str | None,
    kept: int | None = None,
    of_processes: Mapping[str, Any] | None = None,
    folders: Mapping[str, Path | None] | None = None,
) -> int:
    """Serve until a signal to stop comes. Returns its exit code.

    Args:
        flags: of every run, as `run_all.sh` takes them.
        address: host and port; port 0: one that is free.
        kept: jobs that have ended, with their pictures; None: all.
        of_processes: further flags of those that serve stages, as `keep`; of `chips` each is one's.
        folders: `models_dir` and others of `Catalog`, of what requests may name.

    Raises:
        BadSettingError: the address is open to others and there is no key, or it cannot be used.
        UnfitEnvironmentError: another server has the jobs folder, or a stage does not start.
    """
    refuse_open_address(address[0], api_key)
    catalog = catalog_of(flags, folders or {})
    groups, arguments = processes_for(flags, of_processes or {})
    jobs_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = FileLock(jobs_dir / SERVER_LOCK, timeout=1)  # some look whether it is held
    try:
        lock.acquire()
    except Timeout:
        raise UnfitEnvironmentError(
            f"another server has the jobs folder {jobs_dir}: choose another --output_dir"
        ) from None
    try:
        with listening(*address) as listener:
            # Of programs that were killed.
            shutil.rmtree(jobs_dir / SAID_FOLDER, ignore_errors=True)
            began = time.time()
            with StageProcesses(jobs_dir, groups, arguments) as processes:
                service = Service(jobs_dir, flags, Bounds(kept=kept))
                app = make_app(service, catalog, api_key, processes.are_ready)
                announcing = announced(jobs_dir, flags, began)
                _answer(listener, app, service, processes, announcing)
            stopped_by = processes.stopped_by
            return 0 if stopped_by is None else STOP_SIGNALS[stopped_by][1]
    finally:
        lock.release()


def catalog_of(flags: Mapping[str, Any], folders: Mapping[str, Path | None]) -> Catalog:
    """What requests may name.

    Args:
        flags: of every run.
        folders: `models_dir` and others of `Catalog`.

    Raises:
        BadSettingError: a folder or the checkpoint is not there, or does not go with a flag.
        UnfitEnvironmentError: the checkpoint cannot be had from the hub.
    """
    found = Catalog(own_model=model_name(flags), **folders)
    found.check(flags)
    own = Given(FIRST, dict(flags)).settings()
    open_checkpoint(read_run_settings(flags.get("config"), own), [])  # its weights come later
    return found


def processes_for(
    flags: Mapping[str, Any], of_processes: Mapping[str, Any]
) -> tuple[list[Group], list[str]]:
    """The processes of the stages, and the flags of all of them.

    Args:
        flags: of every run.
        of_processes: further flags of those that serve stages; of `chips` each is one's.

    Raises:
        BadSettingError: chips are not shared evenly.
    """
    own = {**of_processes}
    groups = groups_of(own.pop("chips", []))
    own |= {name: flags[name] for name in ("batch_size",) if name in flags}
    return groups, [*flags_of_processes(flags), *(f"--{name}={own[name]}" for name in own)]


def _answer(
    listener: socket.socket,
    app: Any,
    service: Service,
    processes: StageProcesses,
    announcing: AbstractContextManager[None],
) -> None:
    with ExitStack() as told:
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
                        if not processes.share_chips:  # else a run's bits would be others
                            told.enter_context(announcing)
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
