"""Many clients at once: our server beside a plain one around diffusers' pipeline.

    python benchmarks/throughput.py --requests 512 --clients 64

Requests of other prompts, seeds, 10 to 30 steps and two schedulers, each client with one at a time,
in blocks for one server and the other in turn. Prints requests a second, how long an answer took
(50 and 95 of 100), errors, and how far the same picture of both is apart.
"""

import asyncio
import base64
import io
import itertools
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

PROJECT_DIR = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT_DIR))

import httpx
import numpy as np
import typer
from PIL import Image

from benchmarks.warm import NEGATIVE, start_server

SHAPES, COLOURS = ("star", "ring", "cross", "square"), ("red", "green", "blue", "yellow")
PLAIN = PROJECT_DIR / "benchmarks" / "plain_server.py"
COMPARED = 16  # pictures
Body = dict[str, Any]


@dataclass
class Measured:
    """What a server did."""

    url: str
    path: str
    png_of: Callable[[httpx.Response], bytes]
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    errors: int = 0
    pictures: dict[int, np.ndarray] = field(default_factory=dict)  # by their seeds

    async def ask(self, bodies: Sequence[Body], clients: int) -> None:
        """Ask for some pictures, so many at a time."""
        todo = [*reversed(bodies)]
        async with httpx.AsyncClient(timeout=None, limits=httpx.Limits()) as client:

            async def work() -> None:
                while todo:
                    body = todo.pop()
                    began = time.perf_counter()
                    answer = await client.post(self.url + self.path, json=body)
                    self.latencies.append(time.perf_counter() - began)
                    if answer.status_code != 200:
                        self.errors += 1
                    elif body["seed"] < COMPARED:
                        with Image.open(io.BytesIO(self.png_of(answer))) as picture:
                            self.pictures[body["seed"]] = np.asarray(picture.convert("RGB"))

            began = time.perf_counter()
            await asyncio.gather(*(work() for _ in range(clients)))
            self.seconds += time.perf_counter() - began

    def row(self, name: str, per_second: float) -> str:
        """Of the table."""
        cuts = statistics.quantiles(self.latencies, n=20)
        return f"| {name} | {per_second:.2f} | {cuts[9]:.1f} | {cuts[18]:.1f} | {self.errors} |"


def bodies_of(requests: int) -> list[Body]:
    """The requests."""
    chosen = random.Random(7)
    looks = itertools.cycle(itertools.product(COLOURS, SHAPES))
    return [
        {
            "prompt": f"a large {colour} {shape} on a white background, {number}",
            "negative_prompt": NEGATIVE,
            "seed": number,
            "num_inference_steps": chosen.randint(10, 30),
            "guidance_scale": 7.5,
            "scheduler": chosen.choice(("euler", "dpmpp_2m")),
        }
        for number, (colour, shape) in zip(range(requests), looks, strict=False)
    ]


def start_plain() -> "tuple[subprocess.Popen[bytes], str]":
    """diffusers' server, ready; its process and address."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    process = subprocess.Popen([sys.executable, PLAIN, "--port", str(port)])
    url = f"http://127.0.0.1:{port}"
    while True:
        if process.poll() is not None:
            raise RuntimeError("the plain server did not start")
        try:
            httpx.get(f"{url}/openapi.json")
        except httpx.TransportError:
            time.sleep(0.1)
        else:
            return process, url


def main(
    requests: Annotated[int, typer.Option(help="Of each server.", min=1)] = 512,
    clients: Annotated[int, typer.Option(help="At once.", min=1)] = 64,
    blocks: Annotated[int, typer.Option(help="In turn.", min=1)] = 4,
) -> None:
    """Measure both servers under load."""
    bodies = bodies_of(requests)
    with tempfile.TemporaryDirectory() as name:
        process, url = start_server(Path(name))
        other, other_url = start_plain()
        try:
            ours = Measured(
                url,
                "/v1/images/generations",
                lambda answer: base64.b64decode(answer.json()["data"][0]["b64_json"]),
            )
            theirs = Measured(other_url, "/generate", lambda answer: answer.content)
            warm = [{**body, "seed": 2**31 + body["seed"]} for body in bodies[:32]]
            for each, some in ((ours, warm), (theirs, warm[:2])):  # programs are compiled
                asyncio.run(Measured(each.url, each.path, each.png_of).ask(some, clients))
            for first in range(0, requests, -(-requests // blocks)):
                own = bodies[first : first + -(-requests // blocks)]
                for each in (ours, theirs):
                    asyncio.run(each.ask(own, clients))
        finally:
            for each_process in (process, other):
                each_process.terminate()
                each_process.wait()
    print("| Server | requests/s | 50 of 100 within, s | 95 within, s | errors |")
    print("|:--|--:|--:|--:|--:|")
    rates = [requests / each.seconds for each in (ours, theirs)]
    print(ours.row("ours", rates[0]))
    print(theirs.row("FastAPI and diffusers", rates[1]))
    apart = max(
        int(np.abs(ours.pictures[seed].astype(int) - theirs.pictures[seed]).max())
        for seed in ours.pictures.keys() & theirs.pictures.keys()
    )
    print(f"{rates[0] / rates[1]:.2f} x as many; pictures at most {apart}/255 apart")


if __name__ == "__main__":
    typer.run(main)
