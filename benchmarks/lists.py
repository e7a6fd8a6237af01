"""A changed list against the whole list made anew: wall time, rows that are made, bits that stay.

    python benchmarks/lists.py                       # five hundred prompts
    python benchmarks/lists.py --prompts 30 --num_inference_steps 2

Of a list of prompts with seeds of their own ten are added, three are gone, two have another
negative prompt, and all are shuffled. Ends with 1 where a row that stays has other bits, or where
the others are not those of a run of the new list alone, to 1e-5 (latents, relative) and 1/255.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import typer
from safetensors.numpy import load_file

from common.files.artifacts import inspect
from common.files.picture_files import read_pixels
from common.files.report import read_report
from common.files.stage_table import LATENTS_FILE
from common.runs.run_index import read_index

PROJECT_DIR = Path(__file__).resolve().parent.parent
SHAPES = ("circle", "square", "triangle", "star", "diamond", "ring", "cross")
COLOURS = ("red", "green", "blue", "yellow", "white", "black", "purple", "orange")
MOST_DIFFERENCE = 1e-5  # of latents in groups of another shape, of their largest value


def old_list(count: int) -> list[dict[str, Any]]:
    """Prompts with seeds of their own."""
    return [
        {
            "prompt": f"a large {COLOURS[k % len(COLOURS)]} {SHAPES[k % len(SHAPES)]}, {k}",
            "negative_prompt": "blurry",
            "seed": 1000 + k,
        }
        for k in range(count)
    ]


def new_list(old: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """The list as it is changed, and how many of its prompts are new or others."""
    changed = [dict(line) for line in old]
    for gone in (len(changed) // 2, len(changed) // 3, 1):
        del changed[gone]
    for k in (0, len(changed) // 4):
        changed[k]["negative_prompt"] = "dull"
    middle = len(changed) // 2
    changed[middle:middle] = [
        {"prompt": f"a small ring, new {k}", "negative_prompt": "blurry", "seed": 9000 + k}
        for k in range(10)
    ]
    random.Random(0).shuffle(changed)
    return changed, 12


def run(prompts: list[dict[str, Any]], folder: Path, flags: list[str]) -> float:
    """Make a list. Returns the seconds that it took."""
    path = folder.with_suffix(".jsonl")
    path.write_text("".join(json.dumps(line) + "\n" for line in prompts))
    began = time.perf_counter()
    subprocess.run(
        [
            *(sys.executable, PROJECT_DIR / "tools" / "run_all.py", "--prompts_file", path),
            *("--output_dir", folder, "--grid_images", "0", "--progress", "off", *flags),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return time.perf_counter() - began


def rows_by_fingerprint(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Each image's latents and pixels by its latents' fingerprint."""
    header = inspect(folder / LATENTS_FILE).header
    assert header is not None
    latents = load_file(folder / LATENTS_FILE)["latents"]
    pictures = [read_pixels(folder / line["file"]) for line in read_index(folder)]
    return {
        row.fingerprint: pair
        for row, pair in zip(header.rows, zip(latents, pictures, strict=True), strict=True)
    }


def main(
    prompts: Annotated[int, typer.Option("--prompts")] = 500,
    num_inference_steps: Annotated[int, typer.Option("--num_inference_steps")] = 25,
    batch_size: Annotated[int, typer.Option("--batch_size")] = 8,
) -> None:
    """Make a list, change it, make it again; beside the new list alone."""
    flags = ["--num_inference_steps", str(num_inference_steps), "--batch_size", str(batch_size)]
    old = old_list(prompts)
    new, others = new_list(old)
    wrong = []
    with tempfile.TemporaryDirectory() as place:
        kept, alone = Path(place) / "kept", Path(place) / "alone"
        first = run(old, kept, flags)
        before = rows_by_fingerprint(kept)
        second = run(new, kept, flags)
        after = rows_by_fingerprint(kept)
        made = {
            stage: len(new) - report.rows_taken
            for stage in (1, 2, 3)
            if (report := read_report(kept, stage)) is not None
        }
        run(new, alone, flags)
        expected = rows_by_fingerprint(alone)
    if set(made.values()) != {others}:
        wrong.append(f"rows made by stage: {made}, not {others} each")
    for name in before.keys() & after.keys():
        if any(not np.array_equal(*pair) for pair in zip(before[name], after[name], strict=True)):
            wrong.append(f"row {name[:12]} has other bits than before")
    latents = pixels = 0.0
    for name, (own, picture) in expected.items():
        latents = max(latents, float(np.abs(after[name][0] - own).max() / np.abs(own).max()))
        difference = np.abs(after[name][1].astype(int) - picture)
        pixels = max(pixels, float(difference.max()))
    if latents > MOST_DIFFERENCE or pixels > 1:
        wrong.append("rows differ from those of the new list alone")
    print(f"{prompts} prompts, {num_inference_steps} steps, groups of {batch_size}")
    print(f"the list {first:.1f} s, changed {second:.1f} s: {second / first:.3f} of it")
    print(f"rows made by stage: {made}; {len(before.keys() & after.keys())} kept to the bit")
    print(f"beside the new list alone: latents {latents:.1e} relative, pixels {pixels:.0f}/255")
    for line in wrong:
        print(line)
    raise typer.Exit(bool(wrong))


if __name__ == "__main__":
    typer.run(main)
