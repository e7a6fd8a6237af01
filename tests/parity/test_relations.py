"""Relations that hold whatever the weights: batches, ranges of steps, meshes, guidance."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.runs.generation import GenerationConfig
from tests.conftest import LONG
from tests.in_process import Ours, make_config, pixel_difference, relative_difference
from tests.tiny_checkpoints import save_sdxl

# float32 sums in another order: far below what any picture shows.
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sdxl(tmp_path_factory.mktemp("tiny") / "sdxl")


@pytest.fixture(scope="module")
def ours(model: Path) -> Ours:
    return Ours(model)


def batch_of_three(model: Path) -> GenerationConfig:
    return make_config(model, batch=3, num_inference_steps=5)


@pytest.fixture(scope="module")
def together(ours: Ours, model: Path) -> tuple[np.ndarray, np.ndarray]:
    latents = ours.denoise(batch_of_three(model))
    return latents, ours.decode(latents)


def test_an_image_of_a_batch_is_the_image_made_alone(
    ours: Ours, model: Path, together: tuple[np.ndarray, np.ndarray]
) -> None:
    config = batch_of_three(model)
    for index, prompt in enumerate(config.prompts):
        alone = config.model_copy(
            update={"prompts": (prompt,), "seed": config.image_seeds()[index]}
        )
        latents = ours.denoise(alone)
        assert relative_difference(latents[0], together[0][index]) < ROUNDING
        assert pixel_difference(ours.decode(latents)[0], together[1][index]) <= 1


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 2},
        {"mesh": "data=2"},
        pytest.param({"steps_per_call": 2}, marks=LONG),
    ],
    ids=["groups with padding", "two devices", "a loop on the device"],
)
def test_how_it_is_computed_changes_nothing(
    options: dict[str, Any], model: Path, together: tuple[np.ndarray, np.ndarray]
) -> None:
    other = Ours(model, **options)
    latents = other.denoise(batch_of_three(model))
    assert relative_difference(latents, together[0]) < ROUNDING
    assert pixel_difference(other.decode(latents), together[1]) <= 1


def test_warm_up_changes_nothing(model: Path, together: tuple[np.ndarray, np.ndarray]) -> None:
    latents = Ours(model, warmup_steps=2).denoise(batch_of_three(model))
    assert np.array_equal(latents, together[0])


def test_guidance_1_ignores_the_negative_prompt_and_more_does_not(ours: Ours, model: Path) -> None:
    def latents(guidance: float, negative: str | None) -> np.ndarray:
        config = make_config(model, guidance_scale=guidance, negative_prompt=negative)
        return ours.denoise(config)

    assert np.array_equal(latents(1.0, "blurry"), latents(1.0, None))
    three = [latents(5.0, negative) for negative in ("blurry", "", None)]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert relative_difference(three[first], three[second]) > 1e-3


def test_torchaxs_operations_give_the_same(
    ours: Ours, model: Path, together: tuple[np.ndarray, np.ndarray]
) -> None:
    """`--operations torchax` tells whether one of ours is to blame."""
    theirs, (latents, pictures) = Ours(model, operations="torchax"), together
    assert relative_difference(theirs.denoise(batch_of_three(model)), latents) < 1e-4
    assert pixel_difference(theirs.decode(latents), pictures) <= 1
