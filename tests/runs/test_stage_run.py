"""What all stages share: overrides, other folders, being a script or a module, nothing else."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from common.declared import LATENTS
from common.files.stage_table import LATENTS_FILE
from tests.conftest import LONG, PROJECT_DIR, STAGES, Run
from tests.printed import header_of


def test_an_override_is_recorded_and_the_config_left_alone(
    run_copy: Path, quick_stage: Run
) -> None:
    config = (run_copy / "generation_config.json").read_bytes()
    result = quick_stage(2, "--output_dir", run_copy, "--num_inference_steps", 6)
    assert result.returncode == 0, result.stderr
    assert "num_inference_steps 4 → 6" in result.stdout
    assert (run_copy / "generation_config.json").read_bytes() == config
    header = header_of(run_copy / LATENTS_FILE)
    made_with = header["recipe"]["settings"][LATENTS]
    assert made_with["num_inference_steps"] == 6 and made_with["num_images_per_prompt"] == 2
    assert header["provenance"]["overrides"] == {"num_inference_steps": [4, 6]}

    assert quick_stage(3, "--output_dir", run_copy).returncode == 0
    with Image.open(run_copy / "output_image_0001.png") as image:
        settings = json.loads(image.info["staged_diffusion"])["settings"]
        assert "Steps: 6," in image.info["parameters"]
    assert settings["num_inference_steps"] == 6
    assert settings["prompt"] == "a large red star on a blue background"
    assert settings["seed"] == 43 and settings["model_id"] == "models/demo"


def test_another_output_dir_becomes_a_run_of_its_own(
    finished_run: Path, tmp_path: Path, quick_stage: Run
) -> None:
    elsewhere = tmp_path / "elsewhere"
    result = quick_stage(2, "--input_dir", finished_run, "--output_dir", elsewhere, "--seed", 3)
    assert result.returncode == 0, result.stderr
    result = quick_stage(3, "--output_dir", elsewhere)
    assert result.returncode == 0, result.stderr
    assert (elsewhere / "output_grid.png").exists()
    assert json.loads((elsewhere / "generation_config.json").read_text())["seed"] == 3


@pytest.mark.parametrize(
    ("number", "forbidden"),
    [
        pytest.param(1, ("jax", "torchax"), marks=LONG),  # it runs where there is no jax, too
        # jax imports scipy on CPUs, whose LAPACK a stored program might call.
        (2, ("transformers.modeling_utils", "peft", "stages.stage1_text_encoder")),
        (3, ("transformers.modeling_utils", "peft", "scipy", "jax", "stages.stage1_text_encoder")),
    ],
)
def test_a_stage_imports_nothing_of_the_others(
    run_copy: Path, number: int, forbidden: tuple[str, ...]
) -> None:
    program = (
        "import atexit, runpy, sys\n"
        f"sys.argv = [{str(STAGES[number])!r}, '--output_dir', {str(run_copy)!r}]\n"
        f"atexit.register(lambda: print([n for n in {forbidden!r} if n in sys.modules]))\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"


def test_stages_run_as_modules_too(run_copy: Path) -> None:
    for number in (1, 2, 3):
        module = f"stages.{STAGES[number].stem}"
        command = [sys.executable, "-m", module, "--output_dir", str(run_copy), "--skip_fresh"]
        if number == 1:
            command += ["--num_inference_steps", "4", "--num_images_per_prompt", "2"]
        result = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT_DIR)
        assert result.returncode == 0 and "fresh" in result.stdout, result.stderr


@pytest.mark.slow
def test_stages_2_and_3_need_no_text_encoder(run_copy: Path, demo_copy: Path, stage: Run) -> None:
    for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        shutil.rmtree(demo_copy / name)
    before = load_file(run_copy / LATENTS_FILE)["latents"]
    for number in (2, 3):
        result = stage(number, "--output_dir", run_copy, "--model_id", demo_copy, "--skip_fresh")
        assert result.returncode == 0 and "fresh" in result.stdout
    for number in (2, 3):
        result = stage(number, "--output_dir", run_copy, "--model_id", demo_copy)
        assert result.returncode == 0, result.stderr
    assert torch.equal(load_file(run_copy / LATENTS_FILE)["latents"], before)
