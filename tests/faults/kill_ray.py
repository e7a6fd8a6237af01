"""Kill processes, a node and the program that make a list with Ray, and see that nothing is lost.

    python tests/faults/kill_ray.py --rows 2000 --faults 20

On two nodes of this machine. The list must come out whole: each picture once, and that of one run
of run_all.sh (1/255), and for each fault at most two shards made again.
"""

import random
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

PROJECT_DIR = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(PROJECT_DIR))

import psutil
import typer

from common.scale.makers import LIST_FILE, folder_of_shards
from common.scale.watch import Looking
from tests.faults import ray_lists

TARGETS = ("maker", "encoder", "node", "program")
MOST_SECONDS_BETWEEN = 6.0
SECONDS_BETWEEN_LOOKS = 0.01
MOST_MADE_AGAIN = 2  # shards, for each fault


class Begun(Looking):
    """Counts the shards that processes on devices begin, by the folders that they work in."""

    def __init__(self) -> None:
        super().__init__(SECONDS_BETWEEN_LOOKS)
        self._folders: set[str] = set()
        self._is_maker: dict[int, bool] = {}

    def __len__(self) -> int:
        return len(self._folders)

    def look(self) -> None:
        with suppress(OSError):
            for folder in folder_of_shards().iterdir():
                is_new = folder.name not in self._folders and (folder / LIST_FILE).exists()
                if is_new and self._makes(int(folder.name.partition("-")[0])):
                    self._folders.add(folder.name)

    def _makes(self, pid: int) -> bool:
        if pid not in self._is_maker:
            with suppress(psutil.Error, IndexError):
                self._is_maker[pid] = "_MakeShards" in psutil.Process(pid).cmdline()[0]
        return self._is_maker.get(pid, False)


def hit(what: str, cluster: Any, program: Any, chosen: random.Random) -> bool:
    """Kill something. Returns whether there was something to kill."""
    if what == "program":
        program.send_signal(signal.SIGKILL)
        program.wait()
        return True
    if what == "node":
        cluster.remove_node(chosen.choice([*cluster.worker_nodes]), allow_graceful=False)
        cluster.add_node(**ray_lists.NODE)
        return True
    found = ray_lists.processes_of({"maker": "_MakeShards", "encoder": "_EncodeShards"}[what])
    if found:
        with suppress(psutil.Error):
            chosen.choice(found).kill()
    return bool(found)


def make_under_fire(
    prompts: Path, target: Path, log: Path, *, faults: int, seed: int, shard_images: int
) -> Counter[str]:
    """Make a list while its makers are killed. Returns what was killed how often."""
    chosen, hits = random.Random(seed), Counter[str]()
    with ray_lists.two_nodes() as cluster:

        def start() -> Any:
            flags = (f"--address={cluster.address}", "--makers=2")
            return ray_lists.start(prompts, target, log, *flags, f"--shard_images={shard_images}")

        program = start()
        while hits.total() < faults:
            ray_lists.wait_for_shards(target, len(ray_lists.done_shards(target)) + 1, program)
            time.sleep(chosen.uniform(0, MOST_SECONDS_BETWEEN))
            if program.poll() is not None:
                break
            what = chosen.choice(TARGETS)
            if hit(what, cluster, program, chosen):
                hits[what] += 1
                print(f"{len(ray_lists.done_shards(target))} shards: {what}", flush=True)
            if what == "program":
                program = start()
        if (code := program.wait(3600)) != 0:
            raise RuntimeError(f"it ended with {code}: {log.read_text()[-2000:]}")
    return hits


def main(
    rows: Annotated[int, typer.Option("--rows")] = 2000,
    faults: Annotated[int, typer.Option("--faults")] = 20,
    shard_images: Annotated[int, typer.Option("--shard_images")] = 10,
    seed: Annotated[int, typer.Option("--seed")] = 0,
) -> None:
    """Make a list under fire beside one run, and compare the pictures."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prompts = ray_lists.write_rows(folder / "a.jsonl", ray_lists.mixed_rows(rows))
        expected = ray_lists.run_all(prompts, folder / "run")
        target, began = folder / "pictures", time.monotonic()
        with Begun() as begun:
            hits = make_under_fire(
                prompts,
                target,
                folder / "log",
                faults=faults,
                seed=seed,
                shard_images=shard_images,
            )
        wrong = ray_lists.wrong_pictures(target, expected, rows)
        shards, seconds = len(ray_lists.done_shards(target)), time.monotonic() - began
        again = len(begun) - shards
        print(f"{hits.total()} faults ({dict(hits)}), {rows} rows in {seconds:.0f} s")
        print(f"{shards} shards, {again} of them made again or begun again")
        if hits.total() < faults:
            wrong.append(f"the list was done after {hits.total()} faults: give more rows")
        if again > MOST_MADE_AGAIN * hits.total():
            wrong.append(f"more than {MOST_MADE_AGAIN} shards again for each fault")
    print("; ".join(wrong) or "nothing lost, nothing twice")
    if wrong:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
