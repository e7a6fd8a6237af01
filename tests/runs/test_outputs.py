"""What stage 2 writes: latents and trajectories."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from common.declared import EMBEDDINGS, LATENTS
from common.files import artifacts
from common.files.kept_progress import Making
from common.files.made_rows import MadeRows
from common.files.recipe import Recipe, recipe_of_its_latents
from common.files.rows import Rows
from common.files.stage_table import LATENTS_FILE, TRAJECTORY_FILE
from common.runs.outputs import save_latents
from common.sampling.denoising import Denoised
from tests.runs.picture_run import OF_EMBEDDINGS, OF_LATENTS


def denoised(
    folder: Path, recipe: Recipe, steps: torch.Tensor | None = None, **trajectory: Any
) -> Denoised:
    made = MadeRows(folder / LATENTS_FILE, Rows.all_missing([recipe]))
    of_steps = {} if steps is None else {"trajectory": steps}
    made.put([0], {"latents": torch.ones(1, 4, 2, 3), **of_steps}, Making(1.5, {}), keep=False)
    nothing: dict[str, Any] = dict(kept_after=[], trajectory_every=None, profile=None)
    return Denoised(made=made, **nothing | trajectory)


def test_latents_take_the_place_of_another_runs_trajectory(tmp_path: Path) -> None:
    settings = {EMBEDDINGS: OF_EMBEDDINGS, LATENTS: OF_LATENTS}
    recipe = Recipe(stage=2, settings=settings, inputs={}, weights={}, versions={})
    steps = torch.arange(2.0).reshape(1, 2, 1, 1, 1).expand(1, 2, 4, 2, 3)
    kept = denoised(tmp_path, recipe, steps, kept_after=[3, 6], trajectory_every=3)
    shapes = save_latents(tmp_path, kept, recipe, {"device": "cpu"})
    assert shapes == {"latents": [1, 4, 2, 3]}
    trajectory = artifacts.inspect(tmp_path / TRAJECTORY_FILE)
    assert trajectory.header is not None
    assert recipe_of_its_latents(trajectory.header.recipe) == recipe != trajectory.header.recipe
    found = load_file(tmp_path / TRAJECTORY_FILE)
    assert found["steps"].tolist() == [3, 6]
    assert found["latents"].equal(steps.transpose(0, 1))

    save_latents(tmp_path, denoised(tmp_path, recipe), recipe, {"device": "cpu"})
    assert not (tmp_path / TRAJECTORY_FILE).exists()
    header = artifacts.inspect(tmp_path / LATENTS_FILE).header
    assert header is not None and header.recipe == recipe
    assert header.provenance["device"] == "cpu" and header.rows[0].seconds == 1.5
