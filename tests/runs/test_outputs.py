"""What stages 2 and 3 write: latents, trajectories, and pictures with their settings inside."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from common.compute.clock import StageReport
from common.declared import EMBEDDINGS, LATENTS, PICTURES
from common.files import artifacts
from common.files.artifacts import Header
from common.files.picture_files import read_picture_record
from common.files.recipe import Recipe, recipe_of_its_latents
from common.files.rows import Rows
from common.files.stage_table import LATENTS_FILE, TRAJECTORY_FILE
from common.runs.outputs import (
    Decoded,
    PictureFacts,
    picture_settings,
    save_latents,
    save_pictures,
    web_ui_text,
)
from common.sampling.denoising import Denoised
from tests.configs import make_config
from tests.conftest import DEMO

OF_LATENTS = {
    EMBEDDINGS: {
        "prompts": ["a red star", "a ring"],
        "prompts_2": [None, "a blue ring"],
        "negative_prompts": ["blurry", None],
        "negative_prompts_2": [None, None],
    },
    LATENTS: {
        "num_images_per_prompt": 2,
        "seeds": [1, 2, 3, 4],
        "num_inference_steps": 25,
        "scheduler": "EulerAncestralDiscreteScheduler",
        "scheduler_options": {},
        "height": 16,
        "width": 24,
    },
}


def make_recipe(stage: int, settings: dict[str, Any]) -> Recipe:
    return Recipe(stage=stage, settings=settings, inputs={}, weights={}, versions={})


def make_header() -> Header:
    """Of latents of four images, made with another VAE."""
    return artifacts.make_header(make_recipe(2, OF_LATENTS), {"model_id": "models/demo"}, "")


def denoised(**trajectory: Any) -> Denoised:
    nothing = dict(kept_after=[], trajectory=None, trajectory_every=None, profile=None)
    found = nothing | trajectory
    return Denoised(latents=torch.ones(1, 4, 2, 3), **found)


def test_latents_take_the_place_of_another_runs_trajectory(tmp_path: Path) -> None:
    recipe = make_recipe(2, OF_LATENTS)
    steps = torch.zeros(2, 1, 4, 2, 3)
    kept = denoised(trajectory=steps, kept_after=[3, 6], trajectory_every=3)
    rows = Rows.all_missing([recipe])
    save_latents(tmp_path, kept, recipe, rows, {"device": "cpu"})
    trajectory = artifacts.inspect(tmp_path / TRAJECTORY_FILE)
    assert trajectory.header is not None
    assert recipe_of_its_latents(trajectory.header.recipe) == recipe != trajectory.header.recipe
    assert load_file(tmp_path / TRAJECTORY_FILE)["steps"].tolist() == [3, 6]

    save_latents(tmp_path, denoised(), recipe, rows, {"device": "cpu"})
    assert not (tmp_path / TRAJECTORY_FILE).exists()
    header = artifacts.inspect(tmp_path / LATENTS_FILE).header
    assert header is not None and header.recipe == recipe
    assert header.provenance["device"] == "cpu"


def test_a_picture_has_its_own_prompt_and_seed() -> None:
    settings = picture_settings(make_header(), 3)
    assert (settings["prompt"], settings["prompt_2"]) == ("a ring", "a blue ring")
    assert (settings["negative_prompt"], settings["seed"]) == (None, 4)
    assert (settings["image_index"], settings["model_id"]) == (3, "models/demo")
    assert not settings.keys() & {"prompts", "seeds"}


def test_a_grid_has_what_its_pictures_share() -> None:
    settings = picture_settings(make_header(), None)
    assert not settings.keys() & {"prompt", "prompts", "seed", "seeds", "image_index"}
    assert settings["num_inference_steps"] == 25
    assert picture_settings(None, 0) == {}  # latents from elsewhere


def test_web_uis_know_the_sampler_by_their_own_name() -> None:
    lines = web_ui_text(picture_settings(make_header(), 0)).splitlines()
    assert lines[:2] == ["a red star", "Negative prompt: blurry"]
    assert "Sampler: Euler a" in lines[2] and "Steps: 25" in lines[2] and "Size: 24x16" in lines[2]


def test_what_a_jpeg_does_not_hold_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = {**OF_LATENTS[EMBEDDINGS], "prompts": ["a red star, " * 9000, "a ring"]}
    recipe = make_recipe(3, {**OF_LATENTS, EMBEDDINGS: prompts, PICTURES: {"tile": False}})
    header = artifacts.make_header(make_recipe(2, {**OF_LATENTS, EMBEDDINGS: prompts}), {}, "")
    config = make_config(DEMO, image_format="jpg")
    facts = PictureFacts(config=config, header=header, recipe=recipe, overrides=[])
    pixels = np.zeros((4, 16, 24, 3), np.uint8)
    save_pictures(tmp_path, Decoded(images=pixels), facts, None, StageReport(3))
    said = "a JPEG's metadata hold 64 kB: prompt shortened in the pictures; the whole is in stage3"
    assert said in capsys.readouterr().err
    first = read_picture_record(tmp_path / "output_image_0000.jpg")
    assert first is not None and first["settings"]["prompt"].endswith("…")
    last = read_picture_record(tmp_path / "output_image_0003.jpg")
    assert last is not None and last["settings"]["prompt"] == "a ring" and "shortened" not in last


@pytest.mark.parametrize("images", [1, 2])
def test_pictures_take_the_place_of_another_runs(tmp_path: Path, images: int) -> None:
    (tmp_path / "output_image_0007.webp").write_bytes(b"")
    (tmp_path / "holiday.png").write_bytes(b"")
    pixels = np.random.default_rng(0).integers(0, 256, (images, 16, 24, 3), np.uint8)
    recipe = make_recipe(3, OF_LATENTS | {PICTURES: {"vae_dtype": "float32", "tile": False}})
    config = make_config(DEMO, vae="elsewhere")
    overrides = ["vae None → elsewhere"]
    facts = PictureFacts(config=config, header=make_header(), recipe=recipe, overrides=overrides)
    main = save_pictures(tmp_path, Decoded(images=pixels), facts, None, StageReport(3))
    several = [f"output_image_{index:04d}.png" for index in range(images)]
    names = ["output_image.png"] if images == 1 else several
    assert main.name == (names[0] if images == 1 else "output_grid.png")
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {"holiday.png", *names, main.name}
    for index, name in enumerate(names):
        record = read_picture_record(tmp_path / name)
        assert record is not None
        assert (record["fingerprint"], record["overrides"]) == (recipe.fingerprint(), overrides)
        assert (record["settings"]["seed"], record["settings"]["vae"]) == (index + 1, "elsewhere")
        with Image.open(tmp_path / name) as image:
            assert np.array_equal(np.asarray(image), pixels[index])
            assert "Sampler: Euler a" in image.info["parameters"]
