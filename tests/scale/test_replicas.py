"""Replicas of Ray Serve: one that dies, or goes, under load costs no request and no job."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

replicas = pytest.importorskip("common.scale.replicas")

from common.errors import BadSettingError
from common.serving.job_queue import JobQueue
from common.serving.jobs import State
from tests.conftest import PROJECT_DIR
from tests.faults.ray_lists import environment, two_nodes
from tests.refusals import refusal

TOOL = PROJECT_DIR / "tools" / "serve_on_ray.py"
SMALL = {"height": 64, "width": 64, "num_inference_steps": 2, "mesh": "single"}
CLIENTS, SECONDS = 4, 15.0
OTHER = """
import sys
from common.scale.ray_pools import join
from ray import serve
join(sys.argv[1])
serve.start(http_options={"port": 8767})
serve.run(serve.deployment(lambda request: "of others").bind(), name="other", route_prefix="/other")
"""
END = """
import sys
from common.scale.ray_pools import join
from ray import serve
join(sys.argv[1])
serve.shutdown()
"""
DOWN = """
import json, sys
import ray
from common.scale.ray_pools import join
from common.scale.replicas import Scaling
from ray import serve
from tools.serve_on_ray import application
join(sys.argv[1])
serve.run(application(json.loads(sys.argv[2])), name="pictures", route_prefix="/")
"""


class Load:
    """Clients of OpenAI's that ask until they are told to end; each tries twice again."""

    def __init__(self, url: str) -> None:
        self.answered, self.failed = 0, list[str]()
        self._lock, self._ends, self._url = threading.Lock(), threading.Event(), url
        self._threads = [threading.Thread(target=self._ask, args=(k,)) for k in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def _ask(self, who: int) -> None:
        with openai.OpenAI(base_url=f"{self._url}/v1", api_key="any", timeout=120) as client:
            count = 0
            while not self._ends.is_set():
                count += 1
                try:
                    client.images.generate(prompt=f"a star, {who} {count}", model="models/demo")
                    with self._lock:
                        self.answered += 1
                except openai.OpenAIError as error:
                    self.failed.append(f"{who} {count}: {error}")

    def end(self) -> None:
        self._ends.set()
        for thread in self._threads:
            thread.join()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with two_nodes() as found:
        yield found


def replicas_of_serve() -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.cmdline()[0].startswith("ray::ServeReplica:pictures"):
                found.append(process)
        except (psutil.Error, IndexError):
            continue
    return found


def wait_for(count: int, seconds: float = 90) -> None:
    until = time.monotonic() + seconds
    while len(replicas_of_serve()) != count:
        assert time.monotonic() < until, f"{len(replicas_of_serve())} replicas"
        time.sleep(0.2)


@pytest.mark.slow
def test_a_replica_that_is_killed_and_one_that_goes(cluster: Any, tmp_path: Path) -> None:
    jobs_dir, log = tmp_path / "jobs", tmp_path / "log"
    flags = {**SMALL, "output_dir": str(jobs_dir), "min_replicas": 2, "max_replicas": 2}
    flags["queue_dir"] = str(tmp_path / "queue")
    program = begin(cluster, log, flags | {"port": 0})
    try:
        wait_for_words("ready: ", program, log)
        url = log.read_text().partition("ready: ")[2].split()[0]
        load = Load(url)
        time.sleep(SECONDS / 5)
        replicas_of_serve()[0].kill()
        time.sleep(SECONDS)
        wait_for(2)
        down = json.dumps(flags | {"min_replicas": 1, "max_replicas": 1})
        execute(DOWN, cluster.address, down)
        wait_for(1)
        time.sleep(2)
        load.end()
        assert load.failed == [] and load.answered > 3 * CLIENTS
        queue = JobQueue(tmp_path / "queue")
        assert {job.state for job in queue.jobs()} == {State.DONE}
        assert len(queue.jobs()) == load.answered
        queue.close()
        assert httpx.get(f"{url}/readyz").json() == {"ready": True}
        port = int(url.rpartition(":")[2])
        second = begin(cluster, tmp_path / "second", flags | {"port": port})
        assert second.wait(60) == 5
        assert "serves pictures already" in (tmp_path / "second").read_text()
        assert httpx.get(f"{url}/readyz").json() == {"ready": True}
    finally:
        program.terminate()
        assert program.wait(120) == 143, log.read_text()
    assert replicas_of_serve() == []


@pytest.mark.slow
def test_what_others_serve_in_the_cluster_stays(cluster: Any, tmp_path: Path) -> None:
    """Also where replicas have no room, and a signal ends the wait for it."""
    execute(OTHER, cluster.address)
    try:
        flags = {**SMALL, "output_dir": str(tmp_path / "jobs"), "queue_dir": str(tmp_path / "q")}
        log = tmp_path / "log"
        program = begin(cluster, log, flags | {"port": 8765})
        assert program.wait(120) == 2
        assert "--port 8765: Serve answers at 127.0.0.1, port 8767" in log.read_text()
        program = begin(cluster, log, flags | {"port": 8767, "min_replicas": 9, "max_replicas": 9})
        until = time.monotonic() + 120
        while not replicas_of_serve():
            assert program.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.2)
        program.terminate()
        assert program.wait(120) == 143, log.read_text()
        assert "ready" not in log.read_text() and replicas_of_serve() == []
        assert httpx.get("http://127.0.0.1:8767/other").text == "of others"
    finally:
        execute(END, cluster.address)


def begin(cluster: Any, log: Path, flags: dict[str, Any]) -> subprocess.Popen[bytes]:
    """The program, on a cluster."""
    own = (f"--{name}={value}" for name, value in flags.items())
    with log.open("w") as said:
        return subprocess.Popen(
            [sys.executable, TOOL, f"--address={cluster.address}", *own],
            env=environment(),
            stdout=said,
            stderr=said,
        )


def wait_for_words(words: str, program: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + 180
    while words not in log.read_text():
        assert program.poll() is None and time.monotonic() < until, log.read_text()
        time.sleep(0.2)


def execute(script: str, *arguments: str) -> None:
    """Run a script of Python's, from here."""
    command = [sys.executable, "-c", script, *arguments]
    subprocess.run(command, check=True, cwd=PROJECT_DIR, env=environment())


def test_fewer_replicas_than_there_are_to_be() -> None:
    replicas.Scaling(least=2, most=2).check()
    with refusal(BadSettingError, "--min_replicas 3 is more than --max_replicas 2"):
        replicas.Scaling(least=3, most=2).check()
