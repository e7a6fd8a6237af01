"""From a command to a picture: `run_all.sh` and each stage, beside one process of diffusers.

    python benchmarks/cold_start.py
    python benchmarks/cold_start.py --checkout ../before

All caches are warm and every prompt is a new one. `run_all.sh` runs the three stages, each a
process of its own; the one process imports diffusers, loads the same checkpoint and makes the same
picture. A stage's floor is a process that imports what the stage cannot do without, and ends. None
of them takes Python's own way out, which unloads every module. All of it is interleaved, with
`run_all.sh` of other checkouts of the project where there are. Prints medians of wall seconds, and
where each stage's time goes when it is run alone.
"""

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
from PIL import Image
from tqdm import tqdm

from common.files.report import Seconds, read_report
from common.files.stage_table import DECODE, DENOISE, ENCODE, FIRST, OF_EVERY_RUN, Stage
from common.runs.generation import RunSettings

SPARING = "from common.models.library_imports import spare_imports; spare_imports"
# What a stage cannot do without, imported as the stage imports it.
FLOORS = {
    ENCODE: f"import torch; {SPARING}('peft', 'scipy'); import diffusers, transformers; "
    "diffusers.StableDiffusionXLPipeline; transformers.CLIPTextModel; "
    "transformers.CLIPTextModelWithProjection; transformers.CLIPTokenizer",
    DENOISE: f"{SPARING}('peft', 'scipy', 'transformers'); import common.compute.torchax_runtime; "
    "import diffusers; diffusers.UNet2DConditionModel",
    DECODE: f"import torch; {SPARING}('peft', 'scipy', 'transformers'); import diffusers; "
    "diffusers.AutoencoderKL",
}
ENDING = "; import os; os._exit(0)"  # as the stages end: Python's own way out takes a second
ONE_PROCESS = """
import sys
import torch
from diffusers import StableDiffusionXLPipeline

folder, prompt, negative_prompt, steps, guidance, seed, file = sys.argv[1:]
pipeline = StableDiffusionXLPipeline.from_pretrained(
    folder, local_files_only=True, add_watermarker=False
)
pipeline.set_progress_bar_config(disable=True)
pipeline(
    prompt=prompt,
    negative_prompt=negative_prompt,
    num_inference_steps=int(steps),
    guidance_scale=float(guidance),
    generator=torch.Generator().manual_seed(int(seed)),
).images[0].save(file)
"""


def seconds_of(*command: object, cwd: Path = PROJECT_DIR) -> float:
    """Run a command to its end. Returns the wall seconds."""
    began = time.perf_counter()
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=cwd)
    if done.returncode:
        raise RuntimeError(f"{command} ended with {done.returncode}:\n{done.stderr}")
    return time.perf_counter() - began


class Rounds:
    """The seconds of everything that is measured, round by round."""

    def __init__(self, folder: Path, backend: str, checkouts: list[Path]) -> None:
        self.folder, self.backend = folder, backend
        self.checkouts = {"run_all.sh": PROJECT_DIR}
        self.checkouts |= {f"run_all.sh of {path}": path.resolve() for path in checkouts}
        self.settings = RunSettings()
        self.seconds: dict[str, list[float]] = {}
        self.parts: dict[Stage, list[dict[str, float]]] = {stage: [] for stage in OF_EVERY_RUN}
        self.differences: list[int] = []

    def median(self, what: str) -> float:
        """Of all rounds."""
        return statistics.median(self.seconds[what])

    def run(self, number: int) -> None:
        """Measure everything once; the first round warms the caches and does not count."""
        prompt = f"a large red star on a blue background, {number}"
        runs = {what: self.folder / f"{number} {k}" for k, what in enumerate(self.checkouts)}
        found = {
            what: seconds_of(
                "./run_all.sh", "--prompt", prompt, *self.flags(runs[what]), cwd=checkout
            )
            for what, checkout in self.checkouts.items()
        }
        if number == 0:
            return
        own = next(iter(runs.values()))
        found["one process of diffusers"] = self.one_process(prompt, own)
        for stage in OF_EVERY_RUN:
            found |= self.stage_alone(stage, prompt, own)
        for what, taken in found.items():
            self.seconds.setdefault(what, []).append(taken)

    def flags(self, run_dir: Path) -> list[object]:
        """Of a run, or of a stage on devices."""
        return ["--output_dir", run_dir, f"--backend={self.backend}"]

    def one_process(self, prompt: str, run_dir: Path) -> float:
        """The same picture by diffusers; how far ours is from it is kept."""
        settings, theirs = self.settings, run_dir / "diffusers.png"
        sampling = (settings.num_inference_steps, settings.guidance_scale, settings.seed)
        asked = (settings.model_id, prompt, settings.negative_prompt, *sampling)
        taken = seconds_of(sys.executable, "-c", ONE_PROCESS.rstrip() + ENDING, *asked, theirs)
        pictures = [np.asarray(Image.open(f)).astype(int) for f in run_dir.glob("*.png")]
        self.differences.append(int(np.abs(pictures[0] - pictures[1]).max()))
        return taken

    def stage_alone(self, stage: Stage, prompt: str, run_dir: Path) -> dict[str, float]:
        """A stage as a command of its own, and its floor."""
        flags = self.flags(run_dir)
        if stage is FIRST:
            flags = ["--prompt", f"{prompt}!", *flags[:2]]
        taken = seconds_of(sys.executable, f"stages/{stage.script}", *flags)
        report = read_report(run_dir, stage.number)
        assert report is not None
        self.parts[stage].append(report.seconds.model_dump())
        floor = seconds_of(sys.executable, "-c", FLOORS[stage] + ENDING)
        return {f"{stage.name} alone": taken, f"{stage.name}'s floor": floor}

    def print_tables(self) -> None:
        """Medians as Markdown."""
        print("| | wall | least to most |\n|---|---|---|")
        for what, taken in self.seconds.items():
            print(f"| {what} | {self.median(what):.2f} s | {min(taken):.2f} to {max(taken):.2f} |")
        floor = f"{DENOISE.name}'s floor"
        limit = self.median("one process of diffusers") + 2 * self.median(floor)
        print(f"| one process of diffusers and twice {floor} | {limit:.2f} s | |\n")
        print(f"| part | {' | '.join(stage.name for stage in OF_EVERY_RUN)} |")
        print("|---" * (1 + len(OF_EVERY_RUN)) + "|")
        for part in Seconds.model_fields:
            medians = [
                statistics.median(each[part] for each in self.parts[s]) for s in OF_EVERY_RUN
            ]
            if max(medians) >= 0.005:
                print(f"| {part} | " + " | ".join(f"{value:.2f} s" for value in medians) + " |")


def main(
    repeat: Annotated[int, typer.Option("--repeat", help="Timed rounds.", min=1)] = 7,
    backend: Annotated[str, typer.Option("--backend", help="Of stages 2 and 3.")] = "auto",
    checkout: Annotated[
        list[Path] | None, typer.Option("--checkout", help="Another one, with its .venv, as a row.")
    ] = None,
) -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder:
        rounds = Rounds(Path(folder), backend, checkout or [])
        for number in tqdm(range(repeat + 1), desc="rounds"):
            rounds.run(number)
    settings = rounds.settings
    print(
        f"{settings.model_id}, {settings.num_inference_steps} steps, one picture, --backend "
        f"{backend}, {os.cpu_count()} cores, medians of {repeat} interleaved rounds, pictures "
        f"differ by at most {max(rounds.differences)}/255:\n"
    )
    rounds.print_tables()


if __name__ == "__main__":
    typer.run(main)
