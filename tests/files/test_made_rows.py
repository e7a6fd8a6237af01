"""Rows come from an earlier file, from groups that are kept, from memory; written, all are one."""

from pathlib import Path

import pytest
import torch

from common.errors import NotFiniteError
from common.files import artifacts
from common.files.kept_progress import Making, Progress
from common.files.made_rows import MadeRows
from common.files.recipe import Recipe
from common.files.rows import find_rows
from common.files.stage_table import LATENTS_FILE
from tests.files.test_artifacts import make_recipe
from tests.refusals import refusal

MADE_BY = {"mesh": "data=2", "batch_size": 2}
ROW = torch.arange(12.0).reshape(1, 3, 2, 2)


def recipes(*seeds: int) -> list[Recipe]:
    return [make_recipe(seed=seed) for seed in seeds]


def latents(*seeds: int) -> torch.Tensor:
    """Each row is its seed's."""
    return torch.cat([ROW + seed for seed in seeds])


def rows_for(path: Path, *seeds: int, progress: Progress | None = None) -> MadeRows:
    return MadeRows(path, find_rows(path, recipes(*seeds)), progress)


def test_rows_from_three_places_are_written_in_their_order(tmp_path: Path) -> None:
    path, progress = tmp_path / LATENTS_FILE, Progress(tmp_path, 2, {})
    earlier = rows_for(path, 1, 2)
    assert earlier.missing == [0, 1]
    earlier.put([0, 1], {"latents": latents(1, 2)}, Making(0.5, MADE_BY), keep=False)
    assert earlier.write(["latents"], make_recipe(), {}) == {"latents": [2, 3, 2, 2]}

    killed = rows_for(path, 5, 2, 3, 4, progress=progress)
    assert killed.missing == [0, 2, 3] and killed.making(1) == (0.5, MADE_BY)
    killed.put([0, 2], {"latents": latents(5, 3)}, Making(1.5, MADE_BY), keep=True)
    assert (killed.missing, killed.kept) == ([3], 2)

    again = rows_for(path, 4, 3, 2, 5, 1, progress=progress)
    assert (again.missing, again.kept) == ([0], 2)
    again.put([0], {"latents": latents(4)}, Making(2.5, MADE_BY), keep=False)
    assert again.read([3, 1, 4], "latents").equal(latents(5, 3, 1))
    again.write(["latents"], make_recipe(), {})
    found = rows_for(path, 4, 3, 2, 5, 1)
    assert not found.missing and found.read(range(5), "latents").equal(latents(4, 3, 2, 5, 1))
    assert [found.making(row) for row in range(5)] == [
        (seconds, MADE_BY) for seconds in (2.5, 1.5, 0.5, 1.5, 0.5)
    ]
    header = artifacts.inspect(path).header
    assert header is not None and header.provenance["made_by"] == [MADE_BY]
    assert header.made_by(4) == MADE_BY
    assert header.rows[3].data_sha256 == artifacts.hash_tensors({"latents": latents(5)})


def test_what_is_not_finite_is_refused_before_the_next_group(tmp_path: Path) -> None:
    path, progress = tmp_path / LATENTS_FILE, Progress(tmp_path, 2, {})
    made = rows_for(path, 1, 2, progress=progress)
    bad = latents(1)
    bad[0, 0, 0, 0] = torch.nan
    with refusal(NotFiniteError, f"{path} was not written: 1 of 12 values of 'latents'"):
        made.put([0], {"latents": bad}, Making(1.0, MADE_BY), keep=True)
    assert made.missing == [0, 1] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("keep", [True, False])
def test_rows_that_no_recipe_determines(tmp_path: Path, keep: bool) -> None:
    made = MadeRows.numbered(3, Progress(tmp_path, 2, {}))
    made.put(
        [2, 0],
        {"latents": latents(2, 0), "trajectory": latents(7, 8)},
        Making(1.0, MADE_BY),
        keep=keep,
    )
    assert made.missing == [1] and made.making(1) == (None, {})
    assert made.read([0, 2], "latents").equal(latents(0, 2))
    assert made.read([0, 2], "trajectory").equal(latents(8, 7))
    assert len(list(tmp_path.rglob("group_*.safetensors"))) == int(keep)
