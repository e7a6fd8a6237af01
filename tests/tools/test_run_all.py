"""The whole pipeline as processes: what is written, what is said, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from common.errors import BadSettingError
from common.files.picture_files import read_picture_record
from common.files.stage_table import LATENTS_FILE
from tests.conftest import DEMO, Run
from tests.refusals import expect, refusal
from tools import run_all as main_module


def test_a_run_writes_what_the_contract_says(finished_run: Path) -> None:
    names = {path.name for path in finished_run.iterdir()}
    assert names == {
        "generation_config.json",
        "stage1_embeddings.safetensors",
        "stage2_latents.safetensors",
        "output_image_0000.png",
        "output_image_0001.png",
        "output_grid.png",
        "images.jsonl",
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
    latents = load_file(finished_run / LATENTS_FILE)["latents"]
    assert latents.dtype == torch.float32 and latents.shape == (2, 4, 16, 16)
    first, second = (
        np.asarray(Image.open(finished_run / f"output_image_000{index}.png")) for index in (0, 1)
    )
    assert first.shape == (128, 128, 3) and not np.array_equal(first, second)
    grid = np.asarray(Image.open(finished_run / "output_grid.png"))
    assert np.array_equal(grid, np.concatenate([first, second], 1))


def test_a_normal_run_prints_only_our_lines(finished_run: Path) -> None:
    lines = (finished_run.parent / "said").read_text().splitlines()
    assert len(lines) > 6
    for line in lines:
        assert line.startswith(("stage 1: ", "stage 2: ", "stage 3: ", "  ", "picture: ")), line


def test_reports_sum_to_the_wall_time(finished_run: Path) -> None:
    for number in (1, 2, 3):
        report = json.loads((finished_run / f"stage{number}_report.json").read_text())
        assert sum(report["seconds"].values()) == pytest.approx(report["wall_seconds"], abs=0.01)
        assert report["seconds"]["run"] > 0


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
    assert record["overrides"] == {"vae": [None, str(vae)]}
    assert set(record["weights"]) == {"vae"}


def test_run_all_refuses_before_anything_runs(tmp_path: Path, run_all: Run) -> None:
    run_dir = tmp_path / "run"
    for arguments, words in (
        (["--num_inference_step", "3"], ["--num_inference_step"]),
        (["--from_stage", "3", "--to_stage", "2"], ["--from_stage 3"]),
        (["--from_stage", "4"], ["--from_stage 4"]),
        (["--to_stage", "1", "--mesh", "single"], ["--mesh", "no stage from 1 to 1"]),
        (["--from_stage", "3", "--seed", "1"], ["--seed", "no stage from 3 to 3"]),
    ):
        expect(run_all("--output_dir", run_dir, *arguments), 2, *words)
        assert not run_dir.exists()


def test_run_all_ends_with_the_first_failing_stages_code(tmp_path: Path, run_all: Run) -> None:
    result = run_all("--output_dir", tmp_path / "run", "--height", 100)
    expect(result, 2, "--height 100")
    result = run_all("--output_dir", tmp_path / "run", "--from_stage", 2)
    expect(result, 3, "generation_config.json")


def test_some_images_are_made_anew_of_the_run_that_is_there(run_copy: Path, run_all: Run) -> None:
    before = {path.name: path.stat().st_ino for path in run_copy.iterdir()}
    result = run_all("--output_dir", run_copy, "--only", 1)
    assert result.returncode == 0, result.stderr
    assert "by the settings of the run that is there" in result.stdout
    assert result.stdout.count("1 of 2 to make: 1 asked for") == 2
    after = {path.name: path.stat().st_ino for path in run_copy.iterdir()}
    for name in (
        "output_image_0000.png",
        "generation_config.json",
        "stage1_embeddings.safetensors",
    ):
        assert after[name] == before[name]
    assert after["output_image_0001.png"] != before["output_image_0001.png"]
    assert main_module.goes_on({"only": "1", "guidance_scale": 3.0, "output_dir": "x"})
    assert not main_module.goes_on({"only": "1", "prompt": ["a"]})


def test_a_tpu_is_held_by_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    main_module.refuse_unfit_streams({})
    monkeypatch.setattr(main_module, "may_have_tpu", lambda: True)
    main_module.refuse_unfit_streams({"backend": "torch"})
    main_module.refuse_unfit_streams({"remote_vae": "http://localhost"})
    with refusal(BadSettingError, "--stream: one process holds a TPU's chips", "leave it out"):
        main_module.refuse_unfit_streams({"backend": "auto"})
