"""What stage 2 writes: latents and trajectories."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from common.declared import EMBEDDINGS, LATENTS
from common.files import artifacts
from common.files.recipe import Recipe, recipe_of_its_latents
from common.files.rows import Rows
from common.files.stage_table import LATENTS_FILE, TRAJECTORY_FILE
from common.runs.outputs import (
    save_latents,
)
from common.sampling.denoising import Denoised
from tests.runs.picture_run import OF_EMBEDDINGS, OF_LATENTS


def denoised(**trajectory: Any) -> Denoised:
    nothing = dict(
        seconds=[1.5], kept_after=[], trajectory=None, trajectory_every=None, profile=None
    )
    found = nothing | trajectory
    return Denoised(latents=torch.ones(1, 4, 2, 3), **found)


def test_latents_take_the_place_of_another_runs_trajectory(tmp_path: Path) -> None:
    settings = {EMBEDDINGS: OF_EMBEDDINGS, LATENTS: OF_LATENTS}
    recipe = Recipe(stage=2, settings=settings, inputs={}, weights={}, versions={})
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
