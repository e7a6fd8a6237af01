"""A long list with Ray on two nodes: the memory of the program and of each node stays bounded.

    python tests/faults/many_rows.py --rows 50000 --beside 5000

Real stages of a checkpoint of some hundred kB: 64×64, one step. Memory is the most that processes
held together, each with its part of what they share (PSS), beside that of a list of a tenth.
"""

import os
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

PROJECT_DIR = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(PROJECT_DIR))

import psutil
import typer
from pyarrow import parquet

from common.scale.watch import Looking
from tests.faults import ray_lists
from tests.tiny_checkpoints import save_tiniest

MOST_MEMORY = 1.3  # times that of the shorter list
MOST_OF_PROGRAM, MOST_OF_NODE = 500.0, 3500.0  # MB
SECONDS_BETWEEN = 0.5
PROGRAM, FULLEST = "the program", "the fullest node"


class Memory(Looking):
    """The most that trees of processes held, in MB."""

    def __init__(self, roots: Mapping[str, int]) -> None:
        """
        Args:
            roots: name → the process that a tree begins with.
        """
        super().__init__(SECONDS_BETWEEN)
        self.most = dict.fromkeys(roots, 0.0)
        self._roots = roots

    def look(self) -> None:
        for name, pid in self._roots.items():
            self.most[name] = max(self.most[name], held_by(pid))


def held_by(pid: int) -> float:
    """What a process and those that it began hold, in MB."""
    total = 0
    with suppress(psutil.Error):
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            with suppress(psutil.Error):
                total += process.memory_full_info().pss
    return total / 1e6


@dataclass(frozen=True)
class Made:
    """What was measured of a list."""

    rows: int
    seconds: float
    most: dict[str, float]  # MB

    def fullest(self) -> dict[str, float]:
        """Of the nodes the one that held most: which has what processes is Ray's choice."""
        nodes = [most for name, most in self.most.items() if name != PROGRAM]
        return {PROGRAM: self.most[PROGRAM], FULLEST: max(nodes)}

    def said(self) -> str:
        memory = ", ".join(f"{name} {most:.0f} MB" for name, most in self.most.items())
        return (
            f"{self.rows} rows in {self.seconds:.0f} s ({self.rows / self.seconds:.0f} a second): "
            f"{memory}"
        )


def make(cluster: Any, rows: int, target: str, folder: Path, *flags: str) -> Made:
    """Make a list of so many rows on two nodes, each with a process of its own."""
    prompts, model = folder / f"{rows}.jsonl", folder / "model"
    ray_lists.write_rows(prompts, [{"prompt": f"a red star, {k}"} for k in range(rows)])
    if not model.exists():
        save_tiniest(model)
    own = (f"--model_id={model}", "--num_inference_steps=1", *flags)
    began, log = time.monotonic(), folder / f"{rows}.log"
    program = ray_lists.start(prompts, target, log, f"--address={cluster.address}", *own)
    roots = {f"node {k}": pid for k, pid in enumerate(pids_of_nodes(cluster))}
    with Memory({PROGRAM: program.pid, **roots}) as memory:
        code = program.wait()
    seconds = time.monotonic() - began
    if code != 0:
        raise RuntimeError(f"it ended with {code}: {log.read_text()[-2000:]}")
    return Made(rows, seconds, memory.most)


def pids_of_nodes(cluster: Any) -> list[int]:
    """Of each node the process that the others come from."""
    return [
        node.all_processes["raylet"][0].process.pid
        for node in (cluster.head_node, *cluster.worker_nodes)
    ]


def too_much(made: Made) -> list[str]:
    """What held more memory than is stated."""
    bounds = dict.fromkeys(made.most, MOST_OF_NODE) | {PROGRAM: MOST_OF_PROGRAM}
    return [
        f"{name} held {most:.0f} MB of {bounds[name]:.0f}"
        for name, most in made.most.items()
        if most > bounds[name]
    ]


def main(
    rows: Annotated[int, typer.Option("--rows")] = 50_000,
    beside: Annotated[int, typer.Option("--beside")] = 5_000,
    shard_images: Annotated[int, typer.Option("--shard_images")] = 500,
) -> None:
    """Make a long list and a shorter one."""
    wrong, found = [], list[Made]()
    with tempfile.TemporaryDirectory() as place:
        for count in (beside, rows):
            target = Path(place) / f"of_{count}"
            flags = ("--format=webdataset", f"--shard_images={shard_images}")
            with ray_lists.two_nodes() as cluster:
                found.append(make(cluster, count, os.fspath(target), Path(place), *flags))
            print(found[-1].said(), flush=True)
            index = parquet.read_table(target / "index.parquet", columns=["row"])
            if index["row"].to_pylist() != [*range(count)]:
                wrong.append(f"the index of {count} rows is not complete")
    shorter, longer = found
    wrong += too_much(longer)
    for name in (PROGRAM, FULLEST):
        if (times := longer.fullest()[name] / shorter.fullest()[name]) > MOST_MEMORY:
            wrong.append(f"{name} held {times:.2f} times the shorter list's")
    print("; ".join(wrong) or "complete, and memory stays")
    if wrong:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
