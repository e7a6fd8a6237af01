"""What stages 2 and 3 write: latents, trajectories, and pictures with their settings inside."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from common.declared import EMBEDDINGS, LATENTS
from common.files import artifacts
from common.files.artifacts import Header
from common.files.recipe import Recipe, recipe_of_its_latents
from common.files.rows import Rows
from common.files.stage_table import LATENTS_FILE, TRAJECTORY_FILE
from common.runs.outputs import (
    save_latents,
)
from common.sampling.denoising import Denoised

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
    nothing = dict(
        seconds=[1.5], kept_after=[], trajectory=None, trajectory_every=None, profile=None
    )
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
    assert header.provenance["device"] == "cpu" and header.rows[0].seconds == 1.5
