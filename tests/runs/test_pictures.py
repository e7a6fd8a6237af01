"""What is written into a run's pictures, and which of them are fresh."""

from pathlib import Path

from common.runs.pictures import (
    picture_settings,
    web_ui_text,
)
from tests.runs.picture_run import Run, write_all


def test_a_picture_has_its_own_prompt_and_seed(tmp_path: Path) -> None:
    run = Run(tmp_path, {}, {})
    header = run.latents.header
    settings = picture_settings(run.pictures.rows[3], header)
    assert (settings["prompt"], settings["prompt_2"]) == ("a ring", "a blue ring")
    assert (settings["negative_prompt"], settings["seed"]) == (None, 4)
    assert (settings["num_images_per_prompt"], settings["model_id"]) == (1, "models/demo")
    assert not settings.keys() & {"prompts", "seeds"}
    shared = picture_settings(run.pictures.grid_recipe, header)
    assert not shared.keys() & {"prompt", "prompts", "seed", "seeds"}
    assert shared["num_inference_steps"] == 25
    assert picture_settings(run.recipe, None) == {}  # latents from elsewhere


def test_web_uis_know_the_sampler_by_their_own_name(tmp_path: Path) -> None:
    run = Run(tmp_path, {}, {})
    settings = picture_settings(run.pictures.rows[0], run.latents.header)
    lines = web_ui_text(settings).splitlines()
    assert lines[:2] == ["a red star", "Negative prompt: blurry"]
    assert "Sampler: Euler a" in lines[2] and "Steps: 25" in lines[2] and "Size: 24x16" in lines[2]


def test_why_pictures_are_stale_is_told_of_the_first(tmp_path: Path) -> None:
    run = Run(tmp_path, {}, {})
    assert run.why_stale() == "output_image_0000.png is not there"
    write_all(run)
    (tmp_path / "output_image_0002.png").write_bytes(b"")
    assert run.why_stale() == "output_image_0002.png is damaged or not of ours"
