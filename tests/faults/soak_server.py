"""Load a server for some time with all it takes, and see that its processes stay as they are.

    python tests/faults/soak_server.py --minutes 20

Clients ask for pictures of several sizes, schedulers and numbers of steps, begin with pictures,
decode latents, listen to events and forget what has ended. Over the last half each process has to
hold the same memory, and no program may be compiled for shapes that it was compiled for before.
"""

import base64
import io
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

PROJECT_DIR = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(PROJECT_DIR))

import httpx
import numpy as np
import psutil
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table

from common.files.report import Report, read_report
from common.files.stage_table import STAGES
from tests.faults.servers import TIMEOUT, Server, stages_of

SIZES = ((64, 64), (64, 96), (96, 64), (128, 128))  # height, width
SCHEDULERS = ("euler", "ddim", "euler_a", "dpmpp_2m")
SECONDS_BETWEEN_LOOKS = 1.0
WINDOWS = 10  # of the last half
FLAT = 0.05  # how far windows' medians may be apart


class Load:
    """Clients that ask for all there is, each for one thing at a time."""

    def __init__(self, server: Server, clients: int, seed: int) -> None:
        self.failures, self.asked = list[str](), Counter[str]()
        self.programs = Counter[tuple[Any, ...]]()  # compiled, by what they are compiled for
        self._server, self._ends = server, threading.Event()
        picture = io.BytesIO()
        pixels = np.random.default_rng(seed).integers(0, 256, (96, 96, 3), np.uint8)
        Image.fromarray(pixels).save(picture, "PNG")
        self._picture = "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()
        self._threads = [
            threading.Thread(target=self._ask, args=(random.Random(seed + number),), daemon=True)
            for number in range(clients)
        ]
        for thread in self._threads:
            thread.start()

    def _ask(self, chosen: random.Random) -> None:
        ways = (self._make, self._make, self._make, self._begin_with_picture, self._decode)
        with httpx.Client(base_url=self._server.url, timeout=TIMEOUT) as client:
            while not self._ends.is_set():
                way = chosen.choice(ways)
                self.asked[way.__name__.strip("_").replace("_", " ")] += 1
                try:
                    way(client, chosen)
                except Exception as error:
                    self.failures.append(f"{type(error).__name__}: {error}"[:300])
                    return

    def _make(self, client: httpx.Client, chosen: random.Random, **given: Any) -> None:
        height, width = chosen.choice(SIZES)
        settings = {
            "height": height,
            "width": width,
            "num_inference_steps": chosen.randint(4, 30),
            "scheduler": chosen.choice(SCHEDULERS),
            "guidance_scale": chosen.choice((3.0, 7.5)),
            "num_images_per_prompt": chosen.choice((1, 1, 1, 2)),
            **given.pop("settings", {}),
        }
        body = {"prompt": f"star {chosen.random()}", "settings": settings, **given}
        name = client.post("/jobs", json=body).raise_for_status().json()["id"]
        with client.stream("GET", f"/jobs/{name}/events") as events:
            for _ in events.iter_lines():  # until it has ended
                pass
        job = client.get(f"/jobs/{name}").raise_for_status().json()
        if job["state"] != "done":
            raise RuntimeError(f"{job['state']}: {job['error']}")
        for path in job["pictures"]:
            with Image.open(io.BytesIO(client.get(path).raise_for_status().content)) as picture:
                if picture.size != (settings["width"], settings["height"]):
                    raise RuntimeError(f"{picture.size} of {settings}")
        run_dir = self._server.jobs_dir / "runs" / name
        reports = [read_report(run_dir, stage.number) for stage in STAGES]
        for report in filter(None, reports):
            self._count_programs(report, settings["scheduler"])
        if chosen.random() < 0.9:
            client.delete(f"/jobs/{name}").raise_for_status()

    def _begin_with_picture(self, client: httpx.Client, chosen: random.Random) -> None:
        self._make(client, chosen, image=self._picture, settings={"strength": 0.6})

    def _decode(self, client: httpx.Client, chosen: random.Random) -> None:
        height, width = chosen.choice(SIZES)
        latents = np.random.default_rng(1).normal(size=(1, 4, height // 8, width // 8))
        query = {"shape": list(latents.shape), "dtype": "float32", "output_type": "pil"}
        body = latents.astype(np.float32).tobytes()
        answer = client.post("/decode", params=query, content=body).raise_for_status()
        with Image.open(io.BytesIO(answer.content)) as picture:
            picture.verify()

    def _count_programs(self, report: Report, scheduler: str) -> None:
        if report.programs is None:
            return
        own = sum(shape[0] for shape in report.shapes.values())
        shapes = tuple(sorted((name, *shape[1:]) for name, shape in report.shapes.items()))
        # Tables have a shape of their scheduler's, and in a group of several runs an image's each.
        images = (own, report.images_of_others)
        for program in report.programs.each:
            self.programs[report.stage, program.name, images, shapes, scheduler] += 1

    def end(self) -> None:
        """Let each client have its last answer."""
        self._ends.set()
        for thread in self._threads:
            thread.join(TIMEOUT)


def spread(seen: list[float]) -> float:
    """How far apart the medians of the windows of the last half are."""
    half = seen[len(seen) // 2 :]
    medians = [statistics.median(window) for window in np.array_split(np.array(half), WINDOWS)]
    return (max(medians) - min(medians)) / max(medians)


def main(
    minutes: Annotated[float, typer.Option(help="How long.", min=0.5)] = 20,
    clients: Annotated[int, typer.Option(help="That ask at once.", min=1)] = 8,
    seed: Annotated[int, typer.Option(help="Of what they ask for.")] = 0,
) -> None:
    """Load a server, and see what grows."""
    with tempfile.TemporaryDirectory() as name:
        server = Server(Path(name))
        processes = {"server": psutil.Process(server.process.pid), **stages_of(server.process)}
        load = Load(server, clients, seed)
        held: dict[str, list[float]] = {each: [] for each in processes}
        began, halfway = time.monotonic(), Counter[tuple[Any, ...]]()
        while (gone := time.monotonic() - began) < minutes * 60 and not load.failures:
            for each, process in processes.items():
                held[each].append(process.memory_info().rss / 1e6)
            if not halfway and gone > minutes * 30:
                halfway = load.programs.copy()
            if len(held["server"]) % 60 == 0:
                now = ", ".join(f"{each} {seen[-1]:.0f} MB" for each, seen in held.items())
                print(
                    f"{gone / 60:.0f} min: {sum(load.asked.values())} requests; {now}", flush=True
                )
            time.sleep(SECONDS_BETWEEN_LOOKS)
        load.end()
        server.stop()
    tell(load.failures)  # before figures, which tell nothing of a part of the time
    faults = list[str]()
    table = Table("process", "MB at half time", "MB at the end", "apart in the last half")
    for each, seen in held.items():
        apart = spread(seen)
        table.add_row(each, f"{seen[len(seen) // 2]:.0f}", f"{seen[-1]:.0f}", f"{apart:.1%}")
        if apart > FLAT:
            faults.append(f"{each} does not hold the same memory")
    Console().print(table)
    print(", ".join(f"{count} × {what}" for what, count in load.asked.items()))
    print(f"programs: {len(halfway)} shapes at half time, {len(load.programs)} at the end")
    again = [each for each, count in load.programs.items() if count > 1]
    faults += [f"compiled {load.programs[each]} times: {each}" for each in again]
    tell(faults)


def tell(faults: list[str]) -> None:
    """Print what is wrong, and end where something is."""
    for fault in faults:
        print(f"FAULT: {fault}")
    if faults:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
