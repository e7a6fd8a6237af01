"""What the store of traced programs saves: tracing and lowering a step, in processes of their own.

    python benchmarks/tracing.py
    python benchmarks/tracing.py --model models/demo --size 128

The UNet of a checkpoint or of its configs alone; weights are described, not loaded, so that a
full-size SDXL needs no memory. Prints medians of the seconds that a process spends: without the
store, with an empty one, and with what an earlier process kept.
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

import typer

WAYS = ("without", "first", "later")  # as `measure` takes them


def measure(model: str, size: int, way: str) -> float:
    """Seconds to trace and lower one step, in this process."""
    import numpy as np

    from common.compute import jax_start
    from common.compute.clock import StageReport
    from common.compute.devices import Devices
    from common.compute.options import RunOptions
    from common.files.contracts import empty_embeddings
    from common.models.find import open_checkpoint
    from common.models.model_settings import ModelSettings
    from common.runs.generation import read_run_settings, resolve
    from common.runs.jobs import denoising_job, make_sampler
    from common.sampling.loading import UNetToLoad, load_jax_denoiser
    from common.sampling.scheduler_tables import make_tables
    from common.sampling.share import Share

    jax_start.set_up_jax()
    import jax

    checkpoint = open_checkpoint(ModelSettings(model_id=model), ())
    settings = read_run_settings(None, {"model_id": model, "height": size, "width": size})
    config = resolve(settings, native_size=size, size_factor=checkpoint.vae_scale_factor)
    sampler = make_sampler(config, checkpoint)
    empty = empty_embeddings(1, checkpoint.config("unet"))
    job = denoising_job(config, checkpoint, empty, sampler)
    unet = UNetToLoad(checkpoint=checkpoint, loras=(), dtype="bfloat16")
    devices, options = Devices.described(jax.devices(), 1 << 40), RunOptions(mesh="single")
    denoiser = load_jax_denoiser(unet, [job], options, StageReport(2), devices, {})
    denoiser.start(Share(job, np.arange(1), make_tables(sampler)))
    program = denoiser.plan.fullest()
    began = time.perf_counter()
    _ = denoiser.lower(program) if way == "without" else denoiser.lower_stored(program)
    seconds = time.perf_counter() - began
    assert denoiser.report.programs.from_store == (way == "later")
    return seconds


def main(
    model: Annotated[str, typer.Option(help="Checkpoint, or its configs.")] = "models/sdxl_base",
    size: Annotated[int, typer.Option(help="Pixels of a side.")] = 1024,
    rounds: Annotated[int, typer.Option(help="Of which medians are taken.", min=1)] = 5,
    once: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Compare tracing with reading what was traced."""
    if once is not None:
        print(json.dumps(measure(model, size, once)))
        return
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            environment = {**os.environ, "XDG_CACHE_HOME": cache, "JAX_PLATFORMS": "cpu"}
            for way in WAYS:
                command = [sys.executable, __file__, "--model", model, "--size", str(size)]
                done = subprocess.run(
                    [*command, "--once", way],
                    capture_output=True,
                    text=True,
                    check=True,
                    env=environment,
                    cwd=PROJECT_DIR,
                )
                seconds[way].append(json.loads(done.stdout.splitlines()[-1]))
    medians = {way: statistics.median(found) for way, found in seconds.items()}
    print("|  | without | first | later | later / without |\n|---|---|---|---|---|")
    figures = " | ".join(f"{medians[way]:.2f} s" for way in WAYS)
    print(f"| {model}, {size}² | {figures} | {medians['later'] / medians['without']:.2f} |")


if __name__ == "__main__":
    typer.run(main)
