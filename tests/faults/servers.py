"""A server that programs load, kill and watch."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil

RUN_ALL = Path(__file__).resolve().parent.parent.parent / "tools" / "run_all.py"
OF_ALL = ("--height=64", "--width=64", "--mesh=single")
TIMEOUT = 900.0  # seconds; a busy machine is no fault


def stages_of(process: "subprocess.Popen[Any]") -> dict[str, psutil.Process]:
    """The processes of a server's stages that live, by their names here."""
    found = psutil.Process(process.pid).children()
    names = ("stage 1" if "--serve=1" in each.cmdline() else "stages on devices" for each in found)
    return dict(zip(names, found, strict=True))


class Server:
    """A server of one jobs folder at one address, which may be killed and is begun again."""

    def __init__(self, folder: Path) -> None:
        self.jobs_dir, self._said = folder / "jobs", folder / "server.log"
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        """Begin it, and wait until all of its stages are open."""
        command = [sys.executable, RUN_ALL, "--serve", f"--port={self.port}", *OF_ALL]
        # Of what programs are computed by, so that no other program's run_all.sh takes it.
        environment = os.environ | {"PJRT_SERVER_OF_A_TEST": str(self.jobs_dir)}
        with self._said.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, f"--output_dir={self.jobs_dir}"],
                stdout=log,
                stderr=log,
                env=environment,
            )
        self.wait_until_ready()

    def wait_until_ready(self) -> None:
        """Wait until all of its stages are open."""
        until = time.monotonic() + TIMEOUT
        with httpx.Client(base_url=self.url) as client:
            while time.monotonic() < until:
                if self.process.poll() is not None:
                    raise RuntimeError(f"the server ended: {self._said.read_text()[-2000:]}")
                with suppress(httpx.TransportError):
                    if client.get("/readyz").status_code == 200:
                        return
                time.sleep(0.1)
        raise RuntimeError("the server does not get ready")

    def kill(self, target: str) -> None:
        """Kill a part of it, and see that all of it comes back."""
        stages = stages_of(self.process)
        chosen = [child for name, child in stages.items() if target in (name, "all")]
        for child in chosen:
            child.kill()
        if target in ("server", "all"):
            self.process.kill()
            self.process.wait()
            self.start()
        else:
            psutil.wait_procs(chosen)
            time.sleep(0.5)  # the server sees it
            self.wait_until_ready()

    def stop(self) -> None:
        """End it as a supervisor does."""
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(TIMEOUT)
        if code != 143:
            raise RuntimeError(f"the server ended with {code}")
