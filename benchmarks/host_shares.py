"""What a long list takes of a host besides its chips: the figures of tools/plan_scale.py.

    python benchmarks/host_shares.py

One core each: SDXL's text encoders at their size (random weights), a PNG of 1024×1024 (a picture of
the demo checkpoint, enlarged, with a photograph's noise), a row of a list read and divided. Then
what a shard costs whatever it holds (the demo checkpoint on this machine, the same rows in larger
and smaller shards), and what the program does for each (Ray Data with processes that do nothing).
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

PROJECT_DIR = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT_DIR))

import numpy as np
import torch
import typer
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from common.files.picture_files import encode_picture
from common.runs.generation import read_run_settings
from common.scale.shards import about_file, plan_shards

TOOL = PROJECT_DIR / "tools" / "run_on_ray.py"
SDXL, PICTURE = PROJECT_DIR / "models" / "sdxl_base", PROJECT_DIR / "docs/images/middle.png"
TOKENS, NOISE = 77, 2.0  # of 255, one standard deviation
ROWS, LARGE, SMALL = 128, 64, 4  # of a list, and pictures of its shards
SHARDS = 2000  # of the program's


def seconds_of(do: Callable[[], Any], repeat: int) -> float:
    """The median of some calls, after one."""
    do()
    found = []
    for _ in range(repeat):
        began = time.perf_counter()
        do()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


@torch.inference_mode()
def of_text(repeat: int) -> float:
    """Core seconds of a prompt and a negative prompt."""
    torch.set_num_threads(1)
    kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    models = [
        kind(CLIPTextConfig.from_pretrained(SDXL / part)).eval() for part, kind in kinds.items()
    ]
    ids = torch.randint(0, 49_000, (2, TOKENS))
    return seconds_of(lambda: [model(ids, output_hidden_states=True) for model in models], repeat)


def of_picture(repeat: int) -> tuple[float, int]:
    """Core seconds and bytes of a PNG."""
    with Image.open(PICTURE) as picture:
        large = picture.convert("RGB").resize((1024, 1024), Image.Resampling.BICUBIC)
    noise = np.random.default_rng(0).normal(0, NOISE, (1024, 1024, 3))
    pixels = np.clip(np.asarray(large) + noise, 0, 255).astype("uint8")
    seconds = seconds_of(lambda: encode_picture(pixels, ".png", {}, ""), repeat)
    return seconds, len(encode_picture(pixels, ".png", {}, ""))


def of_row(folder: Path, rows: int) -> float:
    """Seconds of a row of a list that is read and divided."""
    file = write_list(folder / "long.jsonl", rows)
    settings, began = read_run_settings(None, {}), time.perf_counter()
    shards = plan_shards([str(file)], settings, images=100, whole="", content_of=about_file)
    assert sum(shard.rows for shard in shards) == rows
    return (time.perf_counter() - began) / rows


def of_shard(folder: Path) -> float:
    """Seconds of a process for each shard, whatever it holds."""
    prompts, seconds = write_list(folder / "short.jsonl", ROWS), {}
    for images in (LARGE, LARGE, SMALL):  # the first time something is compiled
        target = folder / f"of_{images}_{len(seconds)}"
        flags = [f"--shard_images={images}", "--height=64", "--width=64", "--mesh=single"]
        command = [sys.executable, TOOL, prompts, "--output_dir", target, *flags]
        subprocess.run(
            [*map(str, command), "--num_inference_steps=1"],
            check=True,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        ends = sorted(path.stat().st_mtime for path in (target / "index").iterdir())
        # From the first shard's end on, so without what begins.
        seconds[images] = (ends[-1] - ends[0]) / (len(ends) - 1)
    each = (seconds[LARGE] - seconds[SMALL]) / (LARGE - SMALL)
    return seconds[SMALL] - SMALL * each


def of_program() -> float:
    """Seconds of the program for each shard that it hands out, and takes back."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    class Nothing:
        def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            return row

    ray.init(include_dashboard=False, num_cpus=4, log_to_driver=False, logging_level="error")
    DataContext.get_current().enable_progress_bars = False
    rows = [{"shard": "x" * 1000, "row": k} for k in range(SHARDS)]
    data = ray.data.from_items(rows, override_num_blocks=SHARDS)
    pool = ActorPoolStrategy(size=1, max_tasks_in_flight_per_actor=2)
    for _ in range(2):
        data = data.map(Nothing, compute=pool, num_cpus=0.5)
    found = list[float]()
    for _ in data.iter_rows():
        found.append(time.perf_counter())
    ray.shutdown()
    return (found[-1] - found[0]) / (SHARDS - 1)


def write_list(file: Path, rows: int) -> Path:
    file.write_text("".join(json.dumps({"prompt": f"a star, {k}"}) + "\n" for k in range(rows)))
    return file


def main(
    repeat: Annotated[int, typer.Option("--repeat")] = 5,
    rows: Annotated[int, typer.Option("--rows")] = 50_000,
) -> None:
    """Measure, one after the other."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    with tempfile.TemporaryDirectory() as place:
        encode, size = of_picture(repeat)
        print(f"PNG of 1024×1024: {encode:.3f} core seconds, {size / 1e6:.2f} MB", flush=True)
        print(f"a row of a list: {1e3 * of_row(Path(place), rows):.3f} ms", flush=True)
        print(f"SDXL's text encoders: {of_text(repeat):.2f} core seconds a picture", flush=True)
        print(f"a shard, whatever it holds: {of_shard(Path(place)):.2f} s", flush=True)
        print(f"the program: {1e3 * of_program():.2f} ms a shard", flush=True)


if __name__ == "__main__":
    typer.run(main)
