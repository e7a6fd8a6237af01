"""Rows of files: which of them an earlier file has, wherever they stand in it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from common.declared import EMBEDDINGS, IMAGE_LATENTS, LATENTS
from common.files import artifacts
from common.files.made_rows import MadeRows
from common.files.recipe import Recipe
from common.files.rows import Rows, find_rows, row_hashes, row_recipe

NEGATIVE = "negative_prompts"


def recipe_of(
    prompts: list[str], seeds: list[int], images: int = 1, weights: str = "1", **settings: Any
) -> Recipe:
    negatives = settings.pop(NEGATIVE, ["blurry"] * len(prompts))
    return Recipe(
        stage=2,
        settings={
            EMBEDDINGS: {"prompts": prompts, NEGATIVE: negatives, "clip_skip": None},
            IMAGE_LATENTS: {"pictures": ["p"], "masks": []},
            LATENTS: {"seeds": seeds, "num_images_per_prompt": images, "eta": 0.0, **settings},
        },
        inputs={"stage1_embeddings.safetensors": "of all"},
        weights={"unet": weights},
        versions={"torch": "1"},
    )


def rows_of(whole: Recipe) -> list[Recipe]:
    """Each made from a row that has its prompt's name."""
    own, texts = whole.settings[LATENTS], whole.settings[EMBEDDINGS]
    places = [image // own["num_images_per_prompt"] for image in range(len(own["seeds"]))]
    return [
        row_recipe(
            whole, prompt, image, {"stage1": texts["prompts"][prompt] + texts[NEGATIVE][prompt]}
        )
        for image, prompt in enumerate(places)
    ]


def save(path: Path, whole: Recipe) -> torch.Tensor:
    """A file whose rows hold their places."""
    rows = rows_of(whole)
    tensor = torch.arange(float(len(rows)))[:, None].repeat(1, 3)
    fingerprints = [row.fingerprint() for row in rows]
    artifacts.save_tensors(path, {"latents": tensor}, whole, {}, fingerprints)
    return tensor


def test_a_rows_recipe_is_that_of_a_run_of_it_alone() -> None:
    whole = recipe_of(["a star", "a ring"], [5, 6, 7, 8], images=2)
    alone = recipe_of(["a ring"], [7])
    assert rows_of(whole)[2] == rows_of(alone)[0]
    assert rows_of(whole)[2].fingerprint() == rows_of(alone)[0].fingerprint()
    assert len({row.fingerprint() for row in rows_of(whole)}) == 4


def read(rows: Rows, *some: int) -> torch.Tensor:
    assert rows.earlier is not None
    return MadeRows(rows.earlier.path, rows).read(some, "latents")


def test_rows_are_found_wherever_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "stage2_latents.safetensors"
    save(path, recipe_of(["a", "b", "c", "d"], [1, 2, 3, 4]))
    wanted = recipe_of(
        ["c", "new", "a", "d"], [3, 9, 1, 4], **{NEGATIVE: ["blurry", "blurry", "blurry", "dull"]}
    )
    rows = find_rows(path, rows_of(wanted))
    assert rows.places == {0: 2, 2: 0} and rows.missing == [1, 3]
    assert read(rows, 0, 2)[:, 0].tolist() == [2, 0]
    assert read(rows, 2).tolist() == [[0, 0, 0]]
    assert rows.changes().in_words() == "2 of 4 to make: 1 new, 1 changed (negative_prompt)"
    fresh = find_rows(path, rows_of(recipe_of(["b"], [2])))
    assert (
        fresh.missing == []
        and fresh.changes().in_words() == "0 of 1 to make; others stand elsewhere now"
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"eta": 0.5}, "2 of 2 to make: 2 changed (eta)"),
        ({"weights": "2"}, "2 of 2 to make: 2 changed (weights of unet)"),
        ({"seeds": [2, 3]}, "1 of 2 to make: 1 changed (seed)"),
        ({"prompts": ["a", "x"]}, "1 of 2 to make: 1 changed (prompt)"),
        ({"prompts": ["x", "y"], "seeds": [7, 8]}, "2 of 2 to make: 2 new"),
    ],
    ids=str,
)
def test_what_is_to_be_made_is_told_in_words(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    path = tmp_path / "stage2_latents.safetensors"
    base: dict[str, Any] = {"prompts": ["a", "a"], "seeds": [1, 2]}
    save(path, recipe_of(**base))
    assert find_rows(path, rows_of(recipe_of(**(base | changes)))).changes().in_words() == said


def test_a_file_that_is_damaged_or_from_elsewhere_has_none(tmp_path: Path) -> None:
    path = tmp_path / "stage2_latents.safetensors"
    whole = recipe_of(["a"], [1])
    assert find_rows(path, rows_of(whole)).missing == [0]
    save(path, whole)
    assert find_rows(path, rows_of(whole)).missing == []
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert find_rows(path, rows_of(whole)).missing == [0]
    artifacts.save_whole(path, {"latents": torch.ones(1, 3)}, {})
    assert find_rows(path, rows_of(whole)).missing == [0]


def test_hashes_of_rows_are_those_of_their_own_files(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 2, 5), "b": torch.randn(3, 4).bfloat16()}
    path = tmp_path / "any.safetensors"
    artifacts.save_whole(path, tensors, {})
    found = row_hashes(artifacts.inspect(path))
    for k, data_sha256 in enumerate(found):
        row = {name: tensor[k : k + 1].contiguous() for name, tensor in tensors.items()}
        artifacts.save_whole(tmp_path / "row.safetensors", row, {})
        assert artifacts.inspect(tmp_path / "row.safetensors").data_sha256 == data_sha256
