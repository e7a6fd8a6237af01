"""The seed of each image: its own, the run's, its id's or its place's."""

import hashlib

import pytest

from common.conditions.prompt_settings import PromptSettings
from common.declared import validate
from common.errors import BadSettingError
from common.runs.generation import GenerationConfig
from common.runs.seeds import warn_of_seeds
from tests.refusals import refusal


def make(*prompts: dict[str, object], **settings: object) -> GenerationConfig:
    own = [{"prompt": "a", "negative_prompt": None} | prompt for prompt in prompts]
    values = {"prompts": own, "height": 64, "width": 64, "seed": 40, **settings}
    return validate(GenerationConfig, values, "flags")


ID = int(hashlib.sha256(b"x").hexdigest()[:16], 16) % 2**32


@pytest.mark.parametrize(
    ("settings", "seeds", "by_place"),
    [
        ({}, [40, 41, 7, 8, 40 + ID, 41 + ID], True),
        ({"same_seed": True}, [40, 41, 7, 8, 40, 41], False),
        ({"seed_offset": -3}, [37, 38, 4, 5, 37 + ID, 38 + ID], True),
    ],
)
def test_every_image_has_its_seed(
    settings: dict[str, object], seeds: list[int], by_place: bool
) -> None:
    config = make({}, {"seed": 7}, {"id": "x"}, num_images_per_prompt=2, **settings)
    assert config.image_seeds() == seeds
    assert config.seeds_count_places == by_place
    # Without the first, the others stay what they are.
    rest = make({"seed": 7}, {"id": "x"}, num_images_per_prompt=2, **settings)
    assert rest.image_seeds() == seeds[2:] and not rest.seeds_count_places


def test_a_prompt_lists_its_seeds_or_says_how_many_images_it_has() -> None:
    config = make({"seed": [5, 3]}, {"num_images_per_prompt": 3}, {"seed": "7-8, 1"}, {"seed": "9"})
    assert config.images_of_prompts() == [2, 3, 3, 1]
    assert config.prompt_of_images() == [0, 0, 1, 1, 1, 2, 2, 2, 3]
    assert config.image_seeds() == [5, 3, 42, 43, 44, 7, 8, 1, 9]
    moved = make({"seed": [5, 3]}, {"seed": 1}, num_images_per_prompt=2, seed_offset=10)
    assert moved.image_seeds() == [15, 13, 11, 12]
    for seed, said in (
        ("8-7", "go backwards"),
        ([], "seed lists 0: give 1 to"),
        ("a", "valid integer"),
        ([1, -1], "or equal to 0"),
    ):
        with refusal(BadSettingError, said):
            make({"seed": seed})
    with refusal(BadSettingError, "give either seed or seeds, not both"):
        make({"seed": [1, 2], "seeds": [3, 4]})
    with refusal(
        BadSettingError, "seeds are an image each: leave seed and num_images_per_prompt out"
    ):
        make({"seed": [1, 2], "num_images_per_prompt": 2})


def test_seeds_out_of_range_are_refused() -> None:
    with refusal(BadSettingError, "an image would have the seed -2: seeds go from 0"):
        make({"seed": 1}, seed_offset=-3)
    with refusal(BadSettingError, f"the seed {2**63}"):
        make({"seed": 2**63 - 1}, num_images_per_prompt=2)


def test_what_changes_nothing_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    own = PromptSettings(prompt="a", negative_prompt=None, seed=3)
    other = PromptSettings(prompt="a", negative_prompt=None)
    warn_of_seeds([own, own], ["seed"])
    assert "--seed has no effect where prompts have seeds of their own: all prompts have; " in (
        capsys.readouterr().err
    )
    warn_of_seeds([own, other], ["same_seed"])
    assert "--same_seed has no effect where prompts have seeds of their own: 1 of 2 have" in (
        capsys.readouterr().err
    )
    warn_of_seeds([own], ["seed_offset"])
    warn_of_seeds([other], ["seed"])
    assert capsys.readouterr().err == ""
