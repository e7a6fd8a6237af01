"""Recipes: what determines a file, by artifact, and the differences of two in words."""

import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from common.declared import EMBEDDINGS, LATENTS, PICTURES
from common.errors import BadInputFileError
from common.files.recipe import (
    FORMAT_VERSION,
    Recipe,
    age_of_format,
    difference,
    package_versions,
    recipe_of_its_latents,
    recipe_of_trajectory,
    refuse_other_format,
)

SETTINGS = {
    EMBEDDINGS: {"prompts": ["a star"], "clip_skip": None},
    LATENTS: {"seeds": [42], "guidance_scale": 7.5, "unet_dtype": "float32"},
}


def make_recipe(settings: dict[str, dict[str, Any]] = SETTINGS, **changes: Any) -> Recipe:
    fields: dict[str, Any] = {
        "stage": 2,
        "settings": settings,
        "inputs": {"a.safetensors": "1"},
        "weights": {"unet": "1"},
        "versions": {"torch": "1.0"},
    }
    return Recipe(**(fields | changes))


def with_setting(artifact: str, name: str, value: Any) -> dict[str, dict[str, Any]]:
    return SETTINGS | {artifact: SETTINGS.get(artifact, {}) | {name: value}}


def test_the_fingerprint_is_of_the_json_with_sorted_keys() -> None:
    content = {
        "format_version": 2,
        "inputs": {"a.safetensors": "1"},
        "settings": {name: dict(sorted(SETTINGS[name].items())) for name in sorted(SETTINGS)},
        "stage": 2,
        "versions": {"torch": "1.0"},
        "weights": {"unet": "1"},
    }
    text = json.dumps(content, ensure_ascii=False)
    assert make_recipe().fingerprint() == hashlib.sha256(text.encode()).hexdigest()
    assert FORMAT_VERSION == 2


def test_a_recipe_is_the_same_after_it_was_written_and_read() -> None:
    made = make_recipe(with_setting(LATENTS, "sigmas", (14.6, 0.0)))
    read = Recipe.model_validate_json(made.model_dump_json())
    assert read == made and read.fingerprint() == made.fingerprint()
    assert difference(read, made) is None


@pytest.mark.parametrize(
    "settings", [{"seeds": [42]}, {LATENTS: {"x": float("nan")}}, {LATENTS: 3}, [1]]
)
def test_settings_that_are_not_by_artifact_are_none(settings: Any) -> None:
    with pytest.raises((ValidationError, ValueError)):
        make_recipe(settings)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"settings": with_setting(LATENTS, "seeds", [43])}, "seeds [42] → [43]"),
        ({"settings": with_setting(LATENTS, "unet_dtype", "bfloat16")},
         "unet_dtype float32 → bfloat16"),
        ({"settings": with_setting(PICTURES, "tile", True)}, "tile null → true"),
        ({"settings": {EMBEDDINGS: {"prompts": ["a ring"], "clip_skip": 1},
                       LATENTS: SETTINGS[LATENTS] | {"eta": 0.5}}},
         'clip_skip null → 1, eta null → 0.5, prompts ["a star"] → ["a ring"]'),
        ({"inputs": {"a.safetensors": "2"}}, "a.safetensors changed"),
        ({"weights": {"unet": "2", "vae": "1"}},
         "weights of unet changed, weights of vae changed"),
        ({"versions": {"torch": "2.0", "peft": "1"}}, "peft null → 1, torch 1.0 → 2.0"),
        ({"settings": with_setting(LATENTS, "seeds", [1]), "weights": {"unet": "2"}},
         "seeds [42] → [1], weights of unet changed"),
        ({"stage": 1}, "made by another version of this program"),
    ],
)  # fmt: skip
def test_a_difference_is_said_in_words(changes: dict[str, Any], said: str) -> None:
    assert difference(make_recipe(), make_recipe(**changes)) == said


def test_one_setting_of_two_artifacts_is_told_apart() -> None:
    """The second UNet's settings do not hide behind the first's."""
    both = {name: {"guidance_scale": 7.5, "seeds": [1]} for name in (LATENTS, PICTURES)}
    other = {
        LATENTS: {"guidance_scale": 5.0, "seeds": [1]},
        PICTURES: {"guidance_scale": 3.0, "seeds": [2]},
    }
    assert difference(make_recipe(both), make_recipe(other)) == (
        "latents guidance_scale 7.5 → 5.0, pictures guidance_scale 7.5 → 3.0, seeds [1] → [2]"
    )


def test_long_values_are_cut_where_they_differ() -> None:
    long = "a large red star on a blue background, "
    before, after = ({LATENTS: {"text": long * 3 + end}} for end in ("dark", "light"))
    words = difference(make_recipe(before), make_recipe(after))
    assert words == "text …ue background, dark → …ue background, light"


def test_a_trajectory_is_of_its_latents_and_its_steps() -> None:
    latents = make_recipe()
    every_5, every_6 = (recipe_of_trajectory(latents, every) for every in (5, 6))
    assert every_5.settings == with_setting(LATENTS, "save_trajectory", 5)
    assert difference(every_5, every_6) == "save_trajectory 5 → 6"
    assert recipe_of_its_latents(every_5) == recipe_of_its_latents(latents) == latents


@pytest.mark.parametrize(
    ("found", "age"),
    [(1, "an older"), (3, "a newer"), (2, None), ("1", None), (None, None)],
)
def test_a_file_of_another_version_is_refused_with_the_mend(found: Any, age: str | None) -> None:
    """What names no version is refused for what it is, elsewhere."""
    assert age_of_format(found) == age
    if age is None:
        refuse_other_format(Path("x"), found, "make it again")
        return
    with pytest.raises(BadInputFileError) as caught:
        refuse_other_format(Path("x"), found, "make it again")
    assert str(caught.value) == f"x was made by {age} version of this program; make it again"


def test_versions_are_those_of_the_installed_packages() -> None:
    assert package_versions("torch", "pillow") == {
        "torch": importlib.metadata.version("torch"),
        "pillow": importlib.metadata.version("pillow"),
    }
