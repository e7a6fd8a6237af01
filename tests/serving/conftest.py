"""A server of the demo checkpoint, in processes of its own."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from fastapi.testclient import TestClient

from common.serving.catalog import Catalog
from common.serving.http_app import make_app
from common.serving.service import Bounds, Service
from tests.conftest import PROJECT_DIR, RUN_ALL

ON_RAY = PROJECT_DIR / "tools" / "serve_on_ray.py"
BY_RAY = "SERVER_BY_RAY"  # in the environment of tests: `make clients-on-ray`
KEY = {"Authorization": "Bearer secret"}  # of `keyed`
SMALL = ("--height=64", "--width=64", "--num_inference_steps=2", "--mesh=single")


@dataclass(frozen=True)
class Server:
    process: "subprocess.Popen[str]"
    url: str
    jobs_dir: Path
    environment: dict[str, str]  # in which programs find it


def command_of(jobs_dir: Path) -> list[object]:
    """What begins one: `run_all.sh --serve`, or with BY_RAY the replicas of Ray Serve."""
    folder = ("--output_dir", jobs_dir)
    if BY_RAY not in os.environ:
        return [sys.executable, RUN_ALL, "--serve", "--port=0", *folder]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    return [sys.executable, ON_RAY, f"--port={port}", *folder, "--min_replicas=1"]


def start_server(jobs_dir: Path, *flags: object) -> Server:
    """Begin one; it answers when this returns, and may not be ready yet."""
    said = jobs_dir.with_suffix(".log")
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    # Of what programs are computed by, so that no other test's run_all.sh takes it for its own.
    environment["PJRT_SERVER_OF_A_TEST"] = str(jobs_dir)
    with said.open("w") as log:
        process = subprocess.Popen(
            [*map(str, command_of(jobs_dir)), *SMALL, *map(str, flags)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            text=True,
        )
    until = time.monotonic() + 120
    while "ready: " not in said.read_text():
        assert process.poll() is None and time.monotonic() < until, said.read_text()
        time.sleep(0.05)
    (line,) = (line for line in said.read_text().splitlines() if line.startswith("ready: "))
    return Server(process, line.removeprefix("ready: "), jobs_dir, environment)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    found = start_server(tmp_path_factory.mktemp("server") / "jobs")
    assert httpx.get(f"{found.url}/readyz").json() == {"ready": True}
    yield found
    found.process.terminate()
    found.process.wait(60)


@pytest.fixture
def keyed(tmp_path: Path) -> Iterator[TestClient]:
    """A client of an application that wants a key, and whose jobs nobody does."""
    service = Service(tmp_path / "jobs", {}, Bounds(body_bytes=2000, waiting=2))
    app = make_app(service, Catalog(own_model="models/demo"), "secret", lambda: False)
    with TestClient(app, raise_server_exceptions=False) as found:
        yield found
    service.close()
