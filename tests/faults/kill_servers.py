"""Kill a server and its stages at random moments under load, and see that no job is lost.

    python tests/faults/kill_servers.py --kills 100

Clients ask for pictures all the time, each request with a key of its own, and ask again where the
server does not answer. What is accepted must end once, with the picture of an undisturbed run.
"""

import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

PROJECT_DIR = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(PROJECT_DIR))

import httpx
import numpy as np
import typer
from PIL import Image

from common.files.stage_table import STAGES
from common.serving.job_queue import JobQueue
from common.serving.jobs import State
from tests.faults.servers import OF_ALL, RUN_ALL, TIMEOUT, Server

TARGETS = ("server", "stage 1", "stages on devices", "all")
SCHEDULERS = ("euler", "ddim", "euler_a", "dpmpp_2m")
MOST_SECONDS_BETWEEN = 4.0
FURTHEST = 1  # of 255, from an undisturbed run's picture


class Load:
    """Clients that ask for pictures until they are told to stop."""

    def __init__(self, url: str, clients: int, seed: int) -> None:
        self.url, self.accepted = url, dict[str, dict[str, Any]]()  # job → what was asked for
        self._ends, self._lock, self._random = (
            threading.Event(),
            threading.Lock(),
            random.Random(seed),
        )
        self._count, self.failures = 0, list[str]()
        self._threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(clients)]
        for thread in self._threads:
            thread.start()

    def _next(self) -> dict[str, Any]:
        with self._lock:
            self._count += 1
            chosen = self._random
            return {
                "prompt": f"a large star, {self._count}",
                "settings": {
                    "seed": self._count,
                    "num_inference_steps": chosen.randint(4, 24),
                    "scheduler": chosen.choice(SCHEDULERS),
                },
            }

    def _ask(self) -> None:
        with httpx.Client(base_url=self.url) as client:
            self._ask_by(client)

    def _ask_by(self, client: httpx.Client) -> None:
        while not self._ends.is_set():
            body = self._next()
            key = {"Idempotency-Key": f"picture {body['settings']['seed']}"}
            answer = self._until_answered(client, "POST", "/jobs", json=body, headers=key)
            if answer.status_code != 202:
                self.failures.append(f"{answer.status_code}: {answer.text[:200]}")
                return
            name = answer.json()["id"]
            with self._lock:
                self.accepted[name] = body
            while True:  # one picture at a time, as people do
                found = self._until_answered(client, "GET", f"/jobs/{name}")
                if found.json().get("state") not in (State.WAITING, State.RUNNING):
                    break
                time.sleep(0.1)

    def _until_answered(
        self, client: httpx.Client, method: str, path: str, **more: Any
    ) -> httpx.Response:
        while True:
            with suppress(httpx.TransportError):
                answer = client.request(method, path, **more)
                if answer.status_code not in (429, 503):
                    return answer
            time.sleep(0.1)

    def end(self) -> None:
        """Let each client wait for its last picture."""
        self._ends.set()
        until = time.monotonic() + TIMEOUT
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        waiting = sum(thread.is_alive() for thread in self._threads)
        if waiting:
            self.failures.append(f"{waiting} clients wait for a picture that does not come")


def undisturbed(bodies: list[dict[str, Any]], folder: Path) -> list[np.ndarray]:
    """The pictures that a run makes of all that was asked for."""
    lines = [json.dumps({"prompt": body["prompt"], **body["settings"]}) for body in bodies]
    (folder / "all.jsonl").write_text("\n".join(lines) + "\n")
    command = [sys.executable, RUN_ALL, *OF_ALL, f"--prompts_file={folder / 'all.jsonl'}"]
    run_dir = folder / "undisturbed"
    subprocess.run([*command, f"--output_dir={run_dir}", "--warm=never"], check=True)
    named = [json.loads(line) for line in (run_dir / "images.jsonl").read_text().splitlines()]
    return [pixels(run_dir / line["file"]) for line in named]


def pixels(path: Path) -> np.ndarray:
    """A picture's, [H, W, 3]."""
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def main(
    kills: Annotated[int, typer.Option(help="How many.", min=1)] = 100,
    clients: Annotated[int, typer.Option(help="That ask at once.", min=1)] = 12,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
) -> None:
    """Kill, begin again, and compare all pictures."""
    chosen, done = random.Random(seed), dict.fromkeys(TARGETS, 0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = Server(folder)
        load = Load(server.url, clients, seed)
        for number in range(kills):
            time.sleep(chosen.uniform(0, MOST_SECONDS_BETWEEN))
            target = TARGETS[number % len(TARGETS)]
            server.kill(target)
            done[target] += 1
            print(f"{number + 1} of {kills}: {target}; {len(load.accepted)} accepted", flush=True)
        load.end()
        server.stop()
        faults = load.failures
        queue = JobQueue(server.jobs_dir)
        jobs = {job.run_dir.name: job for job in queue.jobs()}
        queue.close()
        faults += [f"{each} is no job" for each in load.accepted.keys() - jobs.keys()]
        faults += [f"{each} is a second job" for each in jobs.keys() - load.accepted.keys()]
        faults += [
            f"{each} is {job.state}: {job.error}"
            for each, job in jobs.items()
            if job.state is not State.DONE
        ]
        names = [each for each in load.accepted if each in jobs and not faults]
        expected = undisturbed([load.accepted[each] for each in names], folder) if names else []
        furthest = 0
        for each, picture in zip(names, expected, strict=True):
            (file,) = (server.jobs_dir / "runs" / each).glob("output_image*.png")
            furthest = max(furthest, int(abs(pixels(file) - picture).max()))
        if furthest > FURTHEST:
            faults.append(f"a picture is {furthest}/255 from an undisturbed run's")
    print(f"kills: {done}; {len(jobs)} jobs of {len(STAGES)} stages, at most {furthest}/255 apart")
    for fault in faults:
        print(f"FAULT: {fault}")
    if faults or not names:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
