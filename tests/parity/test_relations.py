"""Relations that hold whatever the weights: batches, ranges of steps, meshes, guidance."""

from typing import Any

import numpy as np
import pytest

from common.runs.generation import GenerationConfig
from tests.conftest import DEMO
from tests.in_process import Ours, make_config, pixel_difference, relative_difference

# float32 sums in another order: far below what any picture shows.
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def ours() -> Ours:
    return Ours(DEMO)


def batch_of_three() -> GenerationConfig:
    return make_config(DEMO, batch=3, num_inference_steps=5)


@pytest.fixture(scope="module")
def together(ours: Ours) -> tuple[np.ndarray, np.ndarray]:
    latents = ours.denoise(batch_of_three())
    return latents, ours.decode(latents)


def test_an_image_of_a_batch_is_the_image_made_alone(
    ours: Ours, together: tuple[np.ndarray, np.ndarray]
) -> None:
    config = batch_of_three()
    for index, prompt in enumerate(config.prompts):
        alone = config.model_copy(
            update={"prompts": (prompt,), "seed": config.image_seeds()[index]}
        )
        latents = ours.denoise(alone)
        assert relative_difference(latents[0], together[0][index]) < ROUNDING
        assert pixel_difference(ours.decode(latents)[0], together[1][index]) <= 1


@pytest.mark.parametrize(
    "options",
    [{"batch_size": 2}, {"mesh": "data=2"}, {"steps_per_call": 2}],
    ids=["groups with padding", "two devices", "a loop on the device"],
)
def test_how_it_is_computed_changes_nothing(
    options: dict[str, Any], together: tuple[np.ndarray, np.ndarray]
) -> None:
    other = Ours(DEMO, **options)
    latents = other.denoise(batch_of_three())
    assert relative_difference(latents, together[0]) < ROUNDING
    assert pixel_difference(other.decode(latents), together[1]) <= 1


def test_warm_up_changes_nothing(together: tuple[np.ndarray, np.ndarray]) -> None:
    latents = Ours(DEMO, warmup_steps=2).denoise(batch_of_three())
    assert np.array_equal(latents, together[0])


def test_guidance_1_ignores_the_negative_prompt_and_more_does_not(ours: Ours) -> None:
    def latents(guidance: float, negative: str | None) -> np.ndarray:
        config = make_config(DEMO, guidance_scale=guidance, negative_prompt=negative)
        return ours.denoise(config)

    assert np.array_equal(latents(1.0, "blurry"), latents(1.0, None))
    three = [latents(5.0, negative) for negative in ("blurry", "", None)]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert relative_difference(three[first], three[second]) > 1e-3


def test_torchaxs_operations_give_the_same() -> None:
    """`--operations torchax` tells whether one of ours is to blame."""
    config = batch_of_three()
    ours, theirs = Ours(DEMO), Ours(DEMO, operations="torchax")
    latents = ours.denoise(config)
    assert relative_difference(theirs.denoise(config), latents) < 1e-4
    assert pixel_difference(theirs.decode(latents), ours.decode(latents)) <= 1
