"""The whole pipeline as processes: what runs when, what is written, and what is left alone."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from common.files.picture_files import read_picture_record
from tests.conftest import DEMO, PROJECT_DIR, STAGES, Run, file_contents

LATENTS = "stage2_latents.safetensors"


def header_of(path: Path) -> dict:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["staged_diffusion"])


def ran(result: "subprocess.CompletedProcess[str]") -> list[int]:
    """Which stages ran, by what the program printed."""
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("stage ")]
    assert len(lines) == 3
    return [int(line[6]) for line in lines if "fresh" not in line]


def test_a_run_writes_what_the_contract_says(finished_run: Path) -> None:
    names = {path.name for path in finished_run.iterdir()}
    assert names == {
        "generation_config.json",
        "stage1_embeddings.safetensors",
        "stage2_latents.safetensors",
        "output_image_0000.png",
        "output_image_0001.png",
        "output_grid.png",
        *(f"stage{number}_report.json" for number in (1, 2, 3)),
    }
    embeddings = load_file(finished_run / "stage1_embeddings.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in embeddings.items()}
    assert shapes == {
        "prompt_embeds": (1, 77, 160),
        "negative_prompt_embeds": (1, 77, 160),
        "pooled_prompt_embeds": (1, 96),
        "negative_pooled_prompt_embeds": (1, 96),
    }
    latents = load_file(finished_run / LATENTS)["latents"]
    assert latents.dtype == torch.float32 and latents.shape == (2, 4, 16, 16)
    first, second = (
        np.asarray(Image.open(finished_run / f"output_image_000{index}.png")) for index in (0, 1)
    )
    assert first.shape == (128, 128, 3) and not np.array_equal(first, second)
    grid = np.asarray(Image.open(finished_run / "output_grid.png"))
    assert np.array_equal(grid, np.concatenate([first, second], 1))


def test_a_normal_run_prints_only_our_lines(tmp_path: Path, run_all: Run) -> None:
    result = run_all("--output_dir", tmp_path / "run", "--num_inference_steps", 2)
    assert result.returncode == 0
    assert result.stderr == ""
    for line in result.stdout.splitlines():
        assert line.startswith(("stage 1: ", "stage 2: ", "stage 3: ", "  ", "picture: ")), line


def test_reports_sum_to_the_wall_time(finished_run: Path) -> None:
    for number in (1, 2, 3):
        report = json.loads((finished_run / f"stage{number}_report.json").read_text())
        assert sum(report["seconds"].values()) == pytest.approx(report["wall_seconds"], abs=0.01)
        assert report["seconds"]["run"] > 0


def test_only_what_changed_runs_again(run_copy: Path, run_all: Run, tmp_path: Path) -> None:
    base = ["--output_dir", run_copy, "--num_inference_steps", 4, "--num_images_per_prompt", 2]
    before = file_contents(run_copy)
    assert ran(run_all(*base)) == []
    assert file_contents(run_copy) == before
    moved = shutil.copytree(DEMO, tmp_path / "moved")
    assert ran(run_all(*base, "--model_id", moved)) == []
    assert ran(run_all(*base, "--image_format", "webp")) == [3]
    assert not list(run_copy.glob("*.png"))
    result = run_all(*base, "--image_format", "webp", "--seed", 7)
    assert ran(result) == [2, 3]
    assert "seeds [42, 43] → [7, 8]" in result.stdout
    assert ran(run_all(*base, "--prompt", "a small green ring", "--force")) == [1, 2, 3]


def test_a_damaged_output_is_made_again(run_copy: Path, run_all: Run) -> None:
    base = ["--output_dir", run_copy, "--num_inference_steps", 4, "--num_images_per_prompt", 2]
    expected = load_file(run_copy / LATENTS)["latents"].clone()  # the file is mapped, then cut
    content = (run_copy / LATENTS).read_bytes()
    (run_copy / LATENTS).write_bytes(content[:-8])
    (run_copy / "output_image_0001.png").write_bytes(b"")
    result = run_all(*base)
    assert ran(result) == [2, 3]
    assert "stage2_latents.safetensors is damaged" in result.stdout
    assert torch.equal(load_file(run_copy / LATENTS)["latents"], expected)


def test_an_override_is_recorded_and_the_config_left_alone(run_copy: Path, stage: Run) -> None:
    config = (run_copy / "generation_config.json").read_bytes()
    result = stage(2, "--output_dir", run_copy, "--num_inference_steps", 6)
    assert result.returncode == 0, result.stderr
    assert "num_inference_steps 4 → 6" in result.stdout
    assert (run_copy / "generation_config.json").read_bytes() == config
    header = header_of(run_copy / LATENTS)
    assert header["recipe"]["settings"]["num_inference_steps"] == 6
    assert header["recipe"]["settings"]["num_images_per_prompt"] == 2
    assert header["provenance"]["overrides"] == ["num_inference_steps 4 → 6"]

    assert stage(3, "--output_dir", run_copy).returncode == 0
    with Image.open(run_copy / "output_image_0001.png") as image:
        settings = json.loads(image.info["staged_diffusion"])["settings"]
        assert "Steps: 6," in image.info["parameters"]
    assert settings["num_inference_steps"] == 6
    assert settings["prompt"] == "a large red star on a blue background"
    assert settings["seed"] == 43 and settings["model_id"] == "models/demo"


def test_stages_2_and_3_need_no_text_encoder(run_copy: Path, demo_copy: Path, stage: Run) -> None:
    for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        shutil.rmtree(demo_copy / name)
    before = load_file(run_copy / LATENTS)["latents"]
    for number in (2, 3):
        result = stage(number, "--output_dir", run_copy, "--model_id", demo_copy, "--skip_fresh")
        assert result.returncode == 0 and "fresh" in result.stdout
    for number in (2, 3):
        result = stage(number, "--output_dir", run_copy, "--model_id", demo_copy)
        assert result.returncode == 0, result.stderr
    assert torch.equal(load_file(run_copy / LATENTS)["latents"], before)


def test_stage_1_runs_where_jax_is_not_installed(tmp_path: Path) -> None:
    """A site folder with every installed package but jax, jaxlib and torchax."""
    site = tmp_path / "site"
    site.mkdir()
    for entry in Path(torch.__file__).parents[1].iterdir():
        if not entry.name.startswith(("jax", "torchax", "__editable__")):
            (site / entry.name).symlink_to(entry)
    environment = os.environ | {"PYTHONPATH": str(site)}
    check = [sys.executable, "-S", "-c", "import jax"]
    assert subprocess.run(check, env=environment, capture_output=True).returncode != 0
    command = [sys.executable, "-S", str(STAGES[1]), "--output_dir", str(tmp_path / "run")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "stage1_embeddings.safetensors").exists()


@pytest.mark.parametrize(
    ("number", "forbidden"),
    [
        (1, ("jax", "torchax")),
        (2, ("transformers.modeling_utils", "peft", "scipy", "stages.stage1_text_encoder")),
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


def test_prompts_from_a_file_with_their_own_seeds(tmp_path: Path, run_all: Run) -> None:
    lines = [
        {"prompt": "a small green ring on a white background", "seed": 5},
        {"prompt": "a black cross", "negative_prompt": None},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run_dir = tmp_path / "run"
    result = run_all(
        *("--prompts_file", tmp_path / "p.jsonl", "--output_dir", run_dir),
        *("--num_inference_steps", 2, "--num_images_per_prompt", 2),
    )
    assert ran(result) == [1, 2, 3]
    settings = header_of(run_dir / LATENTS)["recipe"]["settings"]
    assert settings["seeds"] == [5, 6, 44, 45]
    assert settings["negative_prompts"][1] is None
    assert len(list(run_dir.glob("output_image_*.png"))) == 4
    embeddings = load_file(run_dir / "stage1_embeddings.safetensors")
    assert not embeddings["negative_prompt_embeds"][1].any()
    assert embeddings["negative_prompt_embeds"][0].any()


def test_a_long_prompt_says_what_was_cut_off(tmp_path: Path, stage: Run) -> None:
    prompt = " ".join(["red"] * 75) + " green blue"
    result = stage(1, "--prompt", prompt, "--output_dir", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    assert "77 tokens" in result.stderr and "'green blue'" in result.stderr


def test_a_strangers_embeddings_pass_with_a_warning(run_copy: Path, stage: Run) -> None:
    from safetensors.torch import save_file

    path = run_copy / "stage1_embeddings.safetensors"
    save_file(load_file(path), path, metadata={"dtype_info": "{}"})
    before = load_file(run_copy / LATENTS)["latents"]
    result = stage(2, "--output_dir", run_copy)
    assert result.returncode == 0, result.stderr
    assert result.stderr.startswith("warning: ") and "cannot be verified" in result.stderr
    assert torch.equal(load_file(run_copy / LATENTS)["latents"], before)


def test_another_output_dir_becomes_a_run_of_its_own(
    finished_run: Path, tmp_path: Path, stage: Run
) -> None:
    elsewhere = tmp_path / "elsewhere"
    result = stage(2, "--input_dir", finished_run, "--output_dir", elsewhere, "--seed", 3)
    assert result.returncode == 0, result.stderr
    result = stage(3, "--output_dir", elsewhere)
    assert result.returncode == 0, result.stderr
    assert (elsewhere / "output_grid.png").exists()
    assert json.loads((elsewhere / "generation_config.json").read_text())["seed"] == 3


@pytest.mark.slow
def test_the_rest_of_a_run_elsewhere_stays_there(run_copy: Path, run_all: Run) -> None:
    """With --input_dir alone every stage works in that directory; pictures say what made them."""
    vae = DEMO / "vae"
    result = run_all("--from_stage", 2, "--input_dir", run_copy, "--seed", 5, "--vae", vae)
    assert result.returncode == 0, result.stderr
    assert f"picture: {run_copy / 'output_grid.png'}" in result.stdout
    record = read_picture_record(run_copy / "output_image_0000.png")
    assert record is not None
    assert (record["settings"]["seed"], record["settings"]["vae"]) == (5, str(vae))
    assert record["overrides"] == [f"vae None → {vae}"]
    assert set(record["weights"]) == {"vae"}
