"""Stages that stay: a request to the server beside diffusers in one process, and a sweep.

    python benchmarks/warm.py

The server answers a request for a new prompt with a PNG; diffusers' pipeline, loaded and warmed
up, makes the same picture in this process. Both in turn; medians of seconds, and how far the
pictures are apart; `run_all.sh` asks the same server in the same turns, with a folder of its own.
Then, with no server, `run_all.sh` makes one picture, all caches warm, and a sweep of six.
"""

import base64
import io
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

PROJECT_DIR = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT_DIR))

import httpx
import numpy as np
import typer
from PIL import Image

STEPS, GUIDANCE, NEGATIVE = 25, 7.5, "blurry, low quality, distorted, deformed"
SWEEP = "scheduler=euler,ddim num_inference_steps=20,25,30"
RUN_ALL = PROJECT_DIR / "tools" / "run_all.py"
SCRIPT = PROJECT_DIR / "run_all.sh"


def start_server(folder: Path) -> "tuple[subprocess.Popen[bytes], str]":
    """A server of the demo checkpoint, ready; its process and address."""
    said = folder / "server.log"
    with said.open("wb") as log:
        command = [sys.executable, RUN_ALL, "--serve", "--port=0", "--output_dir", folder / "jobs"]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    while "ready: " not in said.read_text():
        if process.poll() is not None:
            raise RuntimeError(said.read_text())
        time.sleep(0.1)
    (line,) = (line for line in said.read_text().splitlines() if line.startswith("ready: "))
    return process, line.removeprefix("ready: ")


def ask(url: str, prompt: str, seed: int) -> tuple[float, np.ndarray]:
    """Seconds until the server's PNG is here, and its pixels."""
    body = {"prompt": prompt, "seed": seed}
    began = time.perf_counter()
    answer = httpx.post(f"{url}/v1/images/generations", json=body, timeout=120)
    png = base64.b64decode(answer.raise_for_status().json()["data"][0]["b64_json"])
    seconds = time.perf_counter() - began
    with Image.open(io.BytesIO(png)) as picture:
        return seconds, np.asarray(picture.convert("RGB"))


def by_diffusers(pipeline: Any, prompt: str, seed: int) -> tuple[float, np.ndarray]:
    """The same of a call of diffusers' pipeline."""
    import torch

    began = time.perf_counter()
    picture = pipeline(
        prompt,
        negative_prompt=NEGATIVE,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(seed),
    ).images[0]
    return time.perf_counter() - began, np.asarray(picture)


def seconds_of(*flags: object, warm: bool = False) -> float:
    """Wall seconds of `run_all.sh`, set up before; of a warm server, or of its own stages."""
    began = time.perf_counter()
    done = subprocess.run([SCRIPT, *map(str, flags)], check=True, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if ("a warm server" in done.stdout) is not warm:
        raise RuntimeError(done.stdout)
    return seconds


def main(
    rounds: Annotated[int, typer.Option(help="Requests of each, in turn.", min=1)] = 15,
    runs: Annotated[int, typer.Option(help="Of run_all.sh and of the sweep.", min=1)] = 3,
) -> None:
    """Measure requests to a warm server, and a sweep."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(PROJECT_DIR / "models" / "demo")
    pipeline.set_progress_bar_config(disable=True)
    seconds: dict[str, list[float]] = {"server": [], "diffusers": [], "run_all": []}
    apart = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        process, url = start_server(folder)
        try:
            for number in range(-2, rounds):  # the first two warm up
                prompt = f"a large red star on a blue background, {number}"
                ours, picture = ask(url, prompt, number + 10)
                theirs, expected = by_diffusers(pipeline, prompt, number + 10)
                if number < 0:
                    continue
                seconds["server"].append(ours)
                seconds["diffusers"].append(theirs)
                apart = max(apart, int(np.abs(picture.astype(int) - expected).max()))
                prompt = f"a small green ring on a white background, {number}"
                run_dir = folder / f"served {number}"
                flags = ("--prompt", prompt, "--output_dir", run_dir)
                seconds["run_all"].append(seconds_of(*flags, warm=True))
        finally:
            process.terminate()
            process.wait()
        request, call = (statistics.median(seconds[name]) for name in ("server", "diffusers"))
        print(f"request to PNG {request:.3f} s, diffusers' call {call:.3f} s: {request / call:.2f}")
        print(f"pictures at most {apart}/255 apart")
        run = statistics.median(seconds["run_all"])
        print(f"run_all.sh by the warm server {run:.3f} s: {run - request:.3f} s more")
        one, six = [], []
        for number in range(-1, runs):
            prompt = ("--prompt", f"a small green ring on a white background, {number}")
            alone = seconds_of(*prompt, "--output_dir", folder / f"one {number}")
            swept = seconds_of(*prompt, "--output_dir", folder / f"six {number}", "--sweep", SWEEP)
            if number >= 0:  # the first fills the caches
                one.append(alone)
                six.append(swept)
        alone, swept = statistics.median(one), statistics.median(six)
        print(f"one run {alone:.1f} s, a sweep of six {swept:.1f} s: {swept / alone:.2f}")


if __name__ == "__main__":
    typer.run(main)
