"""A list by Ray on this machine beside the same list in one run, on the same cores.

    python benchmarks/many_hosts.py

Whole commands in turn, of mixed prompts, seeds and steps at 64×64, with the demo checkpoint;
medians of pictures a second, and how far the pictures are apart.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

PROJECT_DIR = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT_DIR))

import numpy as np
import typer
from pyarrow import parquet

from common.files.picture_files import read_pixels

RUN_ALL, ON_RAY = PROJECT_DIR / "tools" / "run_all.py", PROJECT_DIR / "tools" / "run_on_ray.py"
SMALL = ("--height=64", "--width=64", "--mesh=single", "--seed=5")


def seconds_of(*command: object) -> float:
    """A command's, from its begin to its end."""
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, *map(str, command)],
        check=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return time.perf_counter() - began


def furthest(by_ray: Path, run_dir: Path) -> int:
    """The largest difference of any picture's values, of 255."""
    index = parquet.read_table(by_ray / "index.parquet").to_pylist()
    lines = [json.loads(line) for line in (run_dir / "images.jsonl").read_text().splitlines()]
    return max(
        int(
            np.abs(
                read_pixels(by_ray / row["file"]).astype(int) - read_pixels(run_dir / line["file"])
            ).max()
        )
        for row, line in zip(index, lines, strict=True)
    )


def main(
    rows: Annotated[int, typer.Option("--rows")] = 1000,
    rounds: Annotated[int, typer.Option("--rounds")] = 3,
    shard_images: Annotated[int, typer.Option("--shard_images")] = 100,
) -> None:
    """Make a list both ways, in turn."""
    found: dict[str, list[float]] = {"run_all.sh": [], "run_on_ray.py": []}
    with tempfile.TemporaryDirectory() as place:
        prompts = Path(place) / "prompts.jsonl"
        lines = [
            {"prompt": f"a star, {k}", "num_inference_steps": 2 + k % 3}
            | ({"seed": k} if k % 5 == 0 else {})
            for k in range(rows)
        ]
        prompts.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        for turn in range(rounds):
            alone, by_ray = Path(place) / f"alone{turn}", Path(place) / f"ray{turn}"
            flags = ("--prompts_file", prompts, "--output_dir", alone, "--warm=never", *SMALL)
            found["run_all.sh"].append(rows / seconds_of(RUN_ALL, *flags))
            flags = (prompts, "--output_dir", by_ray, f"--shard_images={shard_images}", *SMALL)
            found["run_on_ray.py"].append(rows / seconds_of(ON_RAY, *flags))
        apart = furthest(by_ray, alone)
    medians = {name: statistics.median(each) for name, each in found.items()}
    for name, each in found.items():
        print(f"{name}: {medians[name]:.2f} pictures/s ({min(each):.2f} to {max(each):.2f})")
    ratio = medians["run_on_ray.py"] / medians["run_all.sh"]
    print(f"ratio {ratio:.2f}; pictures at most {apart}/255 apart")


if __name__ == "__main__":
    typer.run(main)
