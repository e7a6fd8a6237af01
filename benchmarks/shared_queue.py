"""How many jobs the queue that replicas on several hosts share takes (docs/scale.md).

    python benchmarks/shared_queue.py

One keeper, and clients that each accept a job, claim its three steps and hand them on, as a replica
and its stages do, on one machine; then clients that only look whether anything has changed. The
file is on the disk of `--folder`: each change waits for it.
"""

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

PROJECT_DIR = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT_DIR))

import ray
import typer

from common.scale.ray_pools import join
from common.scale.remote_queue import SECONDS_BETWEEN_CHANGES, RemoteQueue, end_keeping, keep_queue
from common.serving.jobs import Step

STEPS = [Step(1, ["--prompt=a"]), Step(2, []), Step(3, [])]
LOOKERS = 4  # processes of a replica that look for changes, where nothing is to do


class Client:
    """A replica, as far as the queue is asked."""

    def __init__(self, folder: str, place: str) -> None:
        self._queue, self._folder = RemoteQueue(Path(folder), place), Path(folder)

    def do_jobs(self, count: int) -> None:
        own = f"{os.getpid()}"
        for k in range(count):
            self._queue.add(self._folder / f"{own}-{k}", STEPS)
            for step in STEPS:
                if (job := self._queue.claim([step.stage], own)) is not None:
                    self._queue.hand_on(job)

    def look(self, count: int) -> None:
        for _ in range(count):
            self._queue._ask("changes")


def rate_of(clients: list[Any], method: str, count: int) -> float:
    """What all clients do in a second, each so many."""
    ray.get([getattr(client, method).remote(2) for client in clients])
    began = time.perf_counter()
    ray.get([getattr(client, method).remote(count) for client in clients])
    return len(clients) * count / (time.perf_counter() - began)


def main(
    clients: Annotated[int, typer.Option("--clients")] = 4,
    jobs: Annotated[int, typer.Option("--jobs")] = 200,
    looks: Annotated[int, typer.Option("--looks")] = 3000,
    folder: Annotated[Path | None, typer.Option("--folder")] = None,
) -> None:
    """Measure, one after the other."""
    join(None)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        node = ray.get_runtime_context().get_node_id()
        queue = keep_queue(Path(place), Path(place) / "queue", node=node, most_waiting=10_000)
        all_of_them = [ray.remote(num_cpus=0)(Client).remote(place, queue) for _ in range(clients)]
        print(f"{rate_of(all_of_them, 'do_jobs', jobs):.0f} jobs a second", flush=True)
        asked = rate_of(all_of_them, "look", looks)
        replicas = asked / (LOOKERS / SECONDS_BETWEEN_CHANGES)
        print(f"{asked:.0f} looks a second: those of {replicas:.0f} idle replicas", flush=True)
        end_keeping(queue)


if __name__ == "__main__":
    typer.run(main)
