"""Further passes over a run's latents: what each is given, and that each is a run of its own."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file

from common.errors import BadSettingError
from common.files.stage_table import LATENTS_FILE
from common.runs.generation import write_generation_config
from common.runs.passes import Passes, Turns
from tests.configs import make_config
from tests.conftest import DEMO, Run
from tests.refusals import expect, refusal
from tests.tiny_checkpoints import save_refiner, save_sdxl


def settle(folder: Path, **settings: Any) -> None:
    """The settings of a run or pass whose latents are there."""
    folder.mkdir(exist_ok=True)
    write_generation_config(folder, make_config(DEMO, height=64, width=96, **settings))


def test_enlarged_latents_have_the_size_that_they_come_to(tmp_path: Path) -> None:
    settle(tmp_path)
    given = {"seed": 3, "image": ("a.png",), "strength": 0.2, "height": 64, "batch_size": 2}
    flags = Passes(hires=1.5).flags_of("hires", given, tmp_path)
    assert flags == {
        **{"seed": 3, "batch_size": 2, "height": 96, "width": 144},
        **{"init_latents": tmp_path, "output_dir": tmp_path / "hires"},
        **{"upscale": 1.5, "strength": 0.6},
    }


def test_an_ensemble_cuts_where_the_base_ended(tmp_path: Path) -> None:
    """The refiner has models of its own, and its dtype is the run's."""
    settle(tmp_path, denoising_end=0.7)
    passes = Passes(refiner="ref")
    assert passes.flags_of_the_first({"seed": 3}) == {"seed": 3, "denoising_end": 0.8}
    given = {"denoising_end": 0.7, "model_id": "base", "lora": ("x",), "unet_dtype": "float32"}
    assert passes.flags_of_the_first(given) == given
    flags = passes.flags_of("refiner", given, tmp_path)
    assert flags == {
        **{"model_id": "ref", "unet_dtype": "float32", "denoising_start": 0.7},
        **{"height": 64, "width": 96},
        **{"init_latents": tmp_path, "output_dir": tmp_path / "refiner"},
    }
    assert passes.dropped(given) == {"model_id", "lora"}


def test_both_passes_follow_each_other(tmp_path: Path) -> None:
    settle(tmp_path / "hires")
    passes = Passes(hires=2, refiner="ref", refiner_strength=0.2)
    assert passes.names == ["hires", "refiner"] and not passes.is_ensemble
    flags = passes.flags_of("refiner", {}, tmp_path)
    assert (flags["init_latents"], flags["strength"]) == (tmp_path / "hires", 0.2)
    assert "denoising_start" not in flags


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"hires": 1.0}, "--hires 1.0: give a number over 1"),
        ({"hires_strength": 0.5}, "--hires_strength is for --hires"),
        ({"refiner_strength": 0.5}, "--refiner_strength is for --refiner"),
        ({"hires": 2.0, "refiner": "x"}, "give --refiner_strength"),
    ],
    ids=str,
)
def test_passes_that_cannot_be(asked: dict[str, Any], words: str) -> None:
    with refusal(BadSettingError, words):
        Passes(**asked)


def test_stages_that_are_not_there(tmp_path: Path) -> None:
    with refusal(BadSettingError, "--from_stage refiner: this run has 1, 0, 2, 3, hires"):
        Turns(Passes(hires=2), tmp_path, {}, from_stage="refiner")
    with refusal(BadSettingError, "--to_stage does not go with --hires"):
        Turns(Passes(hires=2), tmp_path, {}, to_stage=2)


@pytest.mark.slow
def test_one_command_makes_two_passes(tmp_path: Path, run_all: Run) -> None:
    base = ("--output_dir", tmp_path, "--num_inference_steps", 4, "--hires", 1.5)
    result = run_all(*base)
    assert result.returncode == 0, result.stderr
    assert load_file(tmp_path / LATENTS_FILE)["latents"].shape[2:] == (16, 16)
    with Image.open(tmp_path / "hires" / "output_image.png") as picture:
        assert picture.size == (192, 192)
    again = run_all(*base)
    assert again.stdout.count("fresh") == 5
    other = run_all(*base, "--from_stage", "hires", "--hires_strength", 0.8)
    assert "strength 0.6 → 0.8" in other.stdout and other.stdout.count("stage 1") == 1


@pytest.mark.slow
def test_a_refiner_takes_the_last_steps(tmp_path: Path, run_all: Run) -> None:
    """Each part is rerun alone; a damaged checkpoint of the refiner spoils nothing of the base."""
    model, refiner = save_sdxl(tmp_path / "base"), save_refiner(tmp_path / "refiner")
    run_dir = tmp_path / "run"
    base = ("--output_dir", run_dir, "--model_id", model, "--num_inference_steps", 5)
    result = run_all(*base, "--refiner", refiner)
    assert result.returncode == 0, result.stderr
    assert "4 of 5 steps" in result.stdout and "1 of 5 steps" in result.stdout
    assert (run_dir / "refiner" / "output_image.png").exists()
    assert not (run_dir / "output_image.png").exists()
    again = run_all(*base, "--refiner", refiner, "--from_stage", "refiner", "--force")
    assert again.returncode == 0 and again.stdout.count("wrote") == 3
    (refiner / "unet" / "config.json").write_text("{")
    expect(run_all(*base, "--refiner", refiner, "--seed", 5), 3, "unet", "config.json")
