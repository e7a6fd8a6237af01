"""From a command to a picture: `run_all.sh` and each stage, beside one process of diffusers.

    python benchmarks/cold_start.py

All caches are warm and every prompt is a new one. `run_all.sh` runs the three stages, each a
process of its own; the one process imports diffusers, loads the same checkpoint and makes the same
picture. A stage's floor is a process that imports what the stage cannot do without, and ends. None
of them takes Python's own way out, which unloads every module. All of it is interleaved. Prints
medians of wall seconds, and where each stage's time goes when it is run alone.
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
from common.runs.generation import RunSettings

STAGES = ("stage1_text_encoder", "stage2_unet", "stage3_vae_decoder")
SPARING = "from common.models.weights import spare_imports; spare_imports"
# What a stage cannot do without, imported as the stage imports it.
FLOORS = {
    1: f"import torch; {SPARING}('peft', 'scipy'); import diffusers, transformers; "
    "diffusers.StableDiffusionXLPipeline; transformers.CLIPTextModel; "
    "transformers.CLIPTextModelWithProjection; transformers.CLIPTokenizer",
    2: f"{SPARING}('peft', 'scipy', 'transformers'); import common.compute.torchax_runtime; "
    "import diffusers; diffusers.UNet2DConditionModel",
    3: f"import torch; {SPARING}('peft', 'scipy', 'transformers'); import diffusers; "
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


def seconds_of(*command: object) -> float:
    """Run a command to its end. Returns the wall seconds."""
    began = time.perf_counter()
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=PROJECT_DIR)
    if done.returncode:
        raise RuntimeError(f"{command} ended with {done.returncode}:\n{done.stderr}")
    return time.perf_counter() - began


def main(
    repeat: Annotated[int, typer.Option("--repeat", help="Timed rounds.", min=1)] = 7,
    backend: Annotated[str, typer.Option("--backend", help="Of stages 2 and 3.")] = "auto",
) -> None:
    """Print the table."""
    settings = RunSettings()
    seconds: dict[str, list[float]] = {}
    parts: dict[int, list[dict[str, float]]] = {1: [], 2: [], 3: []}
    differences = []
    with tempfile.TemporaryDirectory() as temporary:
        for number in tqdm(range(-1, repeat), desc="rounds"):
            folder = Path(temporary) / str(number)
            prompt = f"a large red star on a blue background, {number + 1}"
            options = ["--output_dir", folder, f"--backend={backend}"]
            found = {"run_all.sh": seconds_of("./run_all.sh", "--prompt", prompt, *options)}
            if number < 0:  # warms the caches
                continue
            sampling = (settings.num_inference_steps, settings.guidance_scale, settings.seed)
            asked = (settings.model_id, prompt, settings.negative_prompt, *sampling)
            theirs = folder / "diffusers.png"
            command = (sys.executable, "-c", ONE_PROCESS.rstrip() + ENDING, *asked, theirs)
            found["one process of diffusers"] = seconds_of(*command)
            pictures = [np.asarray(Image.open(f)).astype(int) for f in folder.glob("*.png")]
            differences.append(int(np.abs(pictures[0] - pictures[1]).max()))
            for stage, name in enumerate(STAGES, 1):
                own = ["--prompt", f"{prompt}!"] if stage == 1 else []
                alone = options if stage > 1 else options[:2]
                found[f"stage {stage} alone"] = seconds_of(
                    sys.executable, f"stages/{name}.py", *own, *alone
                )
                report = read_report(folder, stage)
                assert report is not None
                parts[stage].append(report.seconds.model_dump())
                found[f"stage {stage}'s floor"] = seconds_of(
                    sys.executable, "-c", FLOORS[stage] + ENDING
                )
            for what, taken in found.items():
                seconds.setdefault(what, []).append(taken)

    def median(what: str) -> float:
        return statistics.median(seconds[what])

    print(
        f"{settings.model_id}, {settings.num_inference_steps} steps, one picture, --backend "
        f"{backend}, {os.cpu_count()} cores, medians of {repeat} interleaved rounds, pictures "
        f"differ by at most {max(differences)}/255:\n"
    )
    print("| | wall | least to most |\n|---|---|---|")
    for what, taken in seconds.items():
        print(f"| {what} | {median(what):.2f} s | {min(taken):.2f} to {max(taken):.2f} |")
    limit = median("one process of diffusers") + 2 * median("stage 2's floor")
    print(f"| one process of diffusers and twice stage 2's floor | {limit:.2f} s | |\n")
    print("| part | stage 1 | stage 2 | stage 3 |\n|---|---|---|---|")
    for part in Seconds.model_fields:
        medians = [statistics.median(each[part] for each in parts[stage]) for stage in parts]
        if max(medians) >= 0.005:
            print(f"| {part} | " + " | ".join(f"{value:.2f} s" for value in medians) + " |")


if __name__ == "__main__":
    typer.run(main)
