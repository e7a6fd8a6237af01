"""Lists that Ray makes on two nodes of this machine, for those who kill what makes them."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
from pyarrow import parquet

from common.files.picture_files import read_pixels

PROJECT_DIR = Path(__file__).resolve().parent.parent.parent
RUN_ALL, TOOL = PROJECT_DIR / "tools" / "run_all.py", PROJECT_DIR / "tools" / "run_on_ray.py"
SMALL = ("--height=64", "--width=64", "--mesh=single", "--seed=5")
WORDS = ("star", "ring", "cross"), ("red", "green", "blue", "yellow")
FURTHEST = 1  # of 255, from the picture of run_all.sh
NODE = {"num_cpus": 2, "object_store_memory": 200_000_000}


def environment() -> dict[str, str]:
    """Of programs that compute on the CPU, each core a device."""
    own = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return own | {"JAX_PLATFORMS": "cpu"}


def mixed_rows(count: int) -> list[dict[str, Any]]:
    """Of mixed prompts, seeds and steps."""
    found: list[dict[str, Any]] = []
    for k in range(count):
        row = {"prompt": f"a {WORDS[1][k % 4]} {WORDS[0][k % 3]}, {k}"}
        row["num_inference_steps"] = 2 + k % 3
        found.append(row | ({"seed": k} if k % 5 == 0 else {}))
    return found


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    """Write a list; a row that is a text is a line as it stands."""
    path.write_text("".join(f"{x if isinstance(x, str) else json.dumps(x)}\n" for x in rows))
    return path


def run_all(prompts: Path, run_dir: Path, *flags: str) -> Path:
    """Make a list in one run."""
    command = [sys.executable, RUN_ALL, "--prompts_file", prompts, "--output_dir", run_dir]
    own = {"check": True, "env": environment(), "stdout": subprocess.DEVNULL}
    subprocess.run([*command, *SMALL, "--warm=never", *flags], **own)
    return run_dir


@contextmanager
def two_nodes() -> Iterator[Any]:
    """A cluster of two nodes with two cores each, whatever the machine has."""
    from ray.cluster_utils import Cluster

    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    with mock.patch.dict(os.environ, environment() | devices, clear=True):
        cluster = Cluster(initialize_head=True, head_node_args=NODE)
        try:
            cluster.add_node(**NODE)
            yield cluster
        finally:
            cluster.shutdown()


def start(prompts: Path, target: Path | str, log: Path, *flags: str) -> subprocess.Popen[bytes]:
    """Begin to make a list with Ray, whose errors are added to a log."""
    command = [sys.executable, TOOL, prompts, "--output_dir", target, *SMALL, *flags]
    with log.open("a") as file:
        return subprocess.Popen(
            [os.fspath(each) for each in command],
            env=environment(),
            stderr=file,
            stdout=subprocess.DEVNULL,
        )


def wrong_pictures(target: Path, expected: Path, rows: int) -> list[str]:
    """What is not as in the one run: rows that lack or come twice, other pictures, half shards."""
    index = parquet.read_table(target / "index.parquet").to_pylist()
    wrong = [] if [row["row"] for row in index] == [*range(rows)] else ["rows of the index"]
    lines = [json.loads(line) for line in (expected / "images.jsonl").read_text().splitlines()]
    for row, line in zip(index, lines, strict=False):
        if (row["prompt"], row["seed"]) != (line["prompt"], line["seed"]):
            wrong.append(f"row {row['row']}: prompt or seed")
        found = read_pixels(target / row["file"]).astype(int)
        if (furthest := np.abs(found - read_pixels(expected / line["file"])).max()) > FURTHEST:
            wrong.append(f"row {row['row']}: {furthest} of 255 from the picture of run_all.sh")
    shards = sorted(path.name for path in (target / "shards").iterdir())
    if shards != sorted(path.stem for path in (target / "index").iterdir()):
        wrong.append("shards beside those of the index")
    return wrong


def processes_of(name: str) -> list[psutil.Process]:
    """Processes of Ray that have a pool's class in their titles."""
    found = []
    for process in psutil.process_iter():
        try:
            if name in " ".join(process.cmdline()) and "ray::" in process.cmdline()[0]:
                found.append(process)
        except (psutil.Error, IndexError):
            continue
    return found


def done_shards(target: Path) -> set[str]:
    """The names of those that are done."""
    return {path.stem for path in (target / "index").glob("*.parquet")}


def wait_for_shards(target: Path, count: int, run: Any, *, seconds: float = 240) -> None:
    """Wait until so many shards are done, or the program has ended."""
    until = time.monotonic() + seconds
    while len(done_shards(target)) < count and run.poll() is None:
        if time.monotonic() > until:
            raise TimeoutError(f"{len(done_shards(target))} of {count} shards in {seconds:.0f} s")
        time.sleep(0.05)
