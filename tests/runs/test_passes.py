"""Further passes over a run's latents: what each is given, and that each is a run of its own."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file

from common.conditions.prompt_settings import PromptSettings
from common.errors import BadSettingError
from common.files.stage_table import LATENTS_FILE
from common.runs.generation import (
    RunSettings,
    read_generation_config,
    read_run_settings,
    write_generation_config,
)
from common.runs.passes import PROMPTS_FILE, SETTINGS_FILE, Passes, Turns
from common.runs.prompts_file import read_prompts_file
from tests.configs import make_config
from tests.conftest import DEMO, PROJECT_DIR, Run, run_script
from tests.refusals import expect, refusal
from tests.tiny_checkpoints import save_refiner, save_sdxl
from tools.report_page import write_page


def files_of(folder: Path) -> dict[str, Path]:
    """What a pass has of the run before it."""
    return {"config": folder / SETTINGS_FILE, "prompts_file": folder / PROMPTS_FILE}


def settle(folder: Path, **settings: Any) -> None:
    """The settings of a run or pass whose latents are there."""
    folder.mkdir(exist_ok=True)
    write_generation_config(folder, make_config(DEMO, height=64, width=96, **settings))


def test_enlarged_latents_have_the_size_that_they_come_to(tmp_path: Path) -> None:
    settle(tmp_path)
    given = {"seed": 3, "image": ("a.png",), "strength": 0.2, "height": 64, "batch_size": 2}
    flags = Passes(hires=1.5).flags_of("hires", given | {"prompt": ("x",)}, tmp_path)
    assert flags == {
        **{"seed": 3, "batch_size": 2, "height": 96, "width": 144},
        **files_of(tmp_path / "hires"),
        **{"init_latents": tmp_path, "output_dir": tmp_path / "hires"},
        **{"upscale": 1.5, "strength": 0.6},
    }
    stronger = Passes(hires=1.5, hires_strength=0.4).flags_of("hires", {}, tmp_path)
    assert stronger["strength"] == 0.4


def test_an_ensemble_cuts_where_the_base_ended(tmp_path: Path) -> None:
    """The refiner has models of its own, and its dtype is the run's."""
    settle(tmp_path, denoising_end=0.7)
    passes = Passes(refiner="ref")
    early = passes.flags_of_the_first({"seed": 3}, RunSettings())
    assert early == {"seed": 3, "denoising_end": 0.8}
    given = {"denoising_end": 0.7, "model_id": "base", "lora": ("x",), "unet_dtype": "float32"}
    assert passes.flags_of_the_first(given, RunSettings(denoising_end=0.7)) == given
    flags = passes.flags_of("refiner", given, tmp_path)
    assert flags == {
        **{"model_id": "ref", "unet_dtype": "float32", "denoising_start": 0.7},
        **{"height": 64, "width": 96},
        **files_of(tmp_path / "refiner"),
        **{"init_latents": tmp_path, "output_dir": tmp_path / "refiner"},
    }


def test_a_pass_has_the_settings_of_the_run_before_it(tmp_path: Path) -> None:
    """Those of flags, of a config file and of a file of prompts, but for what is the first's."""
    prompts = [
        {"prompt": "a red star", "negative_prompt": None, "seed": 7, "image": "a.png"},
        {"prompt": "a blue ring", "negative_prompt": "dull", "image": "b.png"},
    ]
    lora, scheduled = [{"file": "a.safetensors", "scale": 0.5}], {"scheduler": "ddim", "eta": 0.5}
    first = {"strength": 0.3, "vae": "other", "loras": lora, "unet_dtype": "float32"}
    settle(tmp_path, prompts=prompts, num_inference_steps=7, **scheduled, **first)
    passes = Passes(hires=2, refiner="ref", refiner_strength=0.3)
    models = {"model_id": str(DEMO), "vae": "other", "loras": lora}
    kept = scheduled | {"num_inference_steps": 7, "unet_dtype": "float32"}
    for name, own in (("hires", models), ("refiner", {})):
        passes.write_settings(name, tmp_path)
        shutil.copy(tmp_path / "generation_config.json", tmp_path / name)
        settings = read_run_settings(tmp_path / name / SETTINGS_FILE, {})
        assert settings == RunSettings(**kept, **own)
        read = read_prompts_file(tmp_path / name / PROMPTS_FILE, settings)
        made = [prompt.model_dump(exclude={"image", "mask_image"}) for prompt in read]
        assert made == [
            PromptSettings(**each).model_dump(exclude={"image", "mask_image"}) for each in prompts
        ]
        assert all(prompt.image is None for prompt in read)
    assert passes.dropped(read_generation_config(tmp_path)) == ["loras", "vae"]


def test_a_pass_that_is_run_alone_may_have_prompts_of_its_own(tmp_path: Path) -> None:
    settle(tmp_path)
    passes = Passes(hires=2)
    given: dict[str, Any] = {"negative_prompt": "dull"}
    with refusal(BadSettingError, "--from_stage hires has the prompts", "--negative_prompt"):
        passes.flags_of("hires", given, tmp_path, alone=True)
    flags = passes.flags_of("hires", given | {"prompt": ("x",)}, tmp_path, alone=True)
    assert "prompts_file" not in flags and flags["prompt"] == ("x",)
    assert "prompts_file" in passes.flags_of("hires", {}, tmp_path, alone=True)


def test_both_passes_follow_each_other(tmp_path: Path) -> None:
    settle(tmp_path / "hires")
    passes = Passes(hires=2, refiner="ref", refiner_strength=0.2)
    assert passes.names == ["hires", "refiner"] and not passes.is_ensemble
    flags = passes.flags_of("refiner", {}, tmp_path)
    assert (flags["init_latents"], flags["strength"]) == (tmp_path / "hires", 0.2)
    assert (flags["height"], flags["width"]) == (64, 96)
    assert "denoising_start" not in flags


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"hires": 1.0}, "--hires 1.0: give a number over 1"),
        ({"hires": 9.0}, "--hires 9.0: give a number over 1 and at most 8"),
        ({"hires": 2.0, "hires_strength": 0.0}, "--hires_strength 0.0: give a number over 0"),
        ({"refiner": "x", "refiner_strength": 1.5}, "--refiner_strength 1.5: give a number"),
        ({"hires_strength": 0.5}, "--hires_strength is for --hires"),
        ({"refiner_strength": 0.5}, "--refiner_strength is for --refiner"),
        ({"hires": 2.0, "refiner": "x"}, "give --refiner_strength"),
    ],
    ids=str,
)
def test_passes_that_cannot_be(asked: dict[str, Any], words: str) -> None:
    with refusal(BadSettingError, words):
        Passes(**asked)


@pytest.mark.parametrize(
    ("passes", "given", "words"),
    [
        ({"hires": 2}, {"denoising_end": 0.5}, "--denoising_end leaves noise"),
        ({"hires": 2}, {"keep_unmasked": True}, "--keep_unmasked pastes into the pictures"),
        ({"refiner": "x"}, {"padding_mask_crop": 8}, "--padding_mask_crop pastes into"),
    ],
    ids=str,
)
def test_what_no_pass_goes_on_from(
    passes: dict[str, Any], given: dict[str, Any], words: str, tmp_path: Path
) -> None:
    """Whether a flag or a config file asks for it."""
    (tmp_path / "settings.yaml").write_text(json.dumps(given))
    for asked in (given, {"config": tmp_path / "settings.yaml"}):
        with refusal(BadSettingError, words):
            Turns(Passes(**passes), tmp_path, asked)


def test_prompts_of_several_sizes_are_refused_before_the_first_pass(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "a red star", "height": 96}))
    for passes in ({"hires": 2}, {"refiner": "x"}):
        with refusal(BadSettingError, "goes on from latents of one size"):
            Turns(Passes(**passes), tmp_path / "run", {"prompts_file": prompts})


def test_the_refiner_is_without_the_loras_of_prompts(tmp_path: Path) -> None:
    lora = {"file": "a.safetensors", "scale": 0.5}
    own = {"loras": [lora], "guidance_scale": 3.0}
    config = make_config(
        DEMO, prompts=[{"prompt": "a", "negative_prompt": None, "settings": own}], denoising_end=0.8
    )
    write_generation_config(tmp_path, config)
    for passes, name in ((Passes(hires=2.0), "hires"), (Passes(refiner="x"), "refiner")):
        passes.write_settings(name, tmp_path)
        line = json.loads((tmp_path / name / PROMPTS_FILE).read_text())
        assert line["guidance_scale"] == 3.0
        assert line.get("loras") == ([lora] if name == "hires" else None)
    assert Passes(refiner="x").dropped(config) == ["loras"]


def test_unets_that_are_shown_pictures_are_not_for_enlarged_latents(tmp_path: Path) -> None:
    nine = save_sdxl(tmp_path / "nine", in_channels=9)
    with refusal(BadSettingError, "its UNet is shown pictures, which --hires has none of"):
        Turns(Passes(hires=2), tmp_path / "run", {"model_id": str(nine)})


def test_stages_that_are_not_there(tmp_path: Path) -> None:
    with refusal(BadSettingError, "--from_stage refiner: this run has 1, 0, 2, 3, hires"):
        Turns(Passes(hires=2), tmp_path, {}, from_stage="refiner")
    with refusal(BadSettingError, "--to_stage does not go with --hires"):
        Turns(Passes(hires=2), tmp_path, {}, to_stage=2)


@pytest.mark.slow
@pytest.mark.long
def test_one_command_makes_two_passes(tmp_path: Path, run_all: Run) -> None:
    """Also where the first begins with two pictures of one prompt, as a config file has it."""
    for name in ("a.png", "b.png"):
        Image.new("RGB", (128, 128), "red").save(tmp_path / name)
    pictures = [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    settings = {"image": pictures, "num_inference_steps": 4, "strength": 0.8}
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    run_dir = tmp_path / "run"
    base = ("--output_dir", run_dir, "--config", tmp_path / "run.yaml", "--hires", 1.5)
    result = run_all(*base, "--prompt", "a green star")
    assert result.returncode == 0, result.stderr
    assert load_file(run_dir / LATENTS_FILE)["latents"].shape == (2, 4, 16, 16)
    with Image.open(run_dir / "hires" / "output_image_0001.png") as picture:
        assert picture.size == (192, 192)
    assert {p.prompt for p in read_generation_config(run_dir / "hires").prompts} == {"a green star"}
    page = write_page(tmp_path / "page.html", [run_dir]).read_text(encoding="utf-8")
    assert page.count("what it begins with</figcaption>") == 2 and str(run_dir / "hires") in page
    inspected = run_script(PROJECT_DIR / "tools" / "inspect_run.py", run_dir)
    assert f"hires/ is a further pass, a run of its own: inspect {run_dir}" in inspected.stdout
    assert "stage0_latents.safetensors: fresh" in inspected.stdout
    again = run_all(*base, "--prompt", "a green star")
    assert again.stdout.count("fresh") == 6
    other = run_all(*base, "--from_stage", "hires", "--hires_strength", 0.8)
    assert "strength 0.6 → 0.8" in other.stdout and other.stdout.count("stage 1") == 1


@pytest.mark.slow
@pytest.mark.long
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
