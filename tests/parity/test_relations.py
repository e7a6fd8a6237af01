"""Relations that hold whatever the weights: batches, ranges of steps, meshes, guidance."""

import numpy as np
import pytest

from common.config import GenerationConfig
from common.errors import BadSettingError
from common.sharding import make_mesh, parse_mesh
from tests.conftest import DEMO
from tests.in_process import make_config, pixel_difference, relative_difference, run_ours

# float32 sums in another order: far below what any picture shows.
ROUNDING = 1e-5


def batch_of_three() -> GenerationConfig:
    return make_config(DEMO, batch=3, num_inference_steps=5)


@pytest.fixture(scope="module")
def together() -> tuple[np.ndarray, np.ndarray]:
    return run_ours(batch_of_three())


def test_an_image_of_a_batch_is_the_image_made_alone(
    together: tuple[np.ndarray, np.ndarray],
) -> None:
    config = batch_of_three()
    for index, prompt in enumerate(config.prompts):
        alone = config.model_copy(
            update={"prompts": (prompt,), "seed": config.image_seeds()[index]}
        )
        latents, pictures = run_ours(alone)
        assert relative_difference(together[0][index], latents[0]) < ROUNDING
        assert pixel_difference(together[1][index], pictures[0]) <= 1


def test_groups_with_padding_give_the_same_images(
    together: tuple[np.ndarray, np.ndarray],
) -> None:
    latents, pictures = run_ours(batch_of_three(), batch_size=2)
    assert relative_difference(latents, together[0]) < ROUNDING
    assert pixel_difference(pictures, together[1]) <= 1


def test_a_loop_on_the_device_equals_steps_from_the_host(
    together: tuple[np.ndarray, np.ndarray],
) -> None:
    latents, _ = run_ours(batch_of_three(), steps_per_call=2)
    assert relative_difference(latents, together[0]) < ROUNDING


def test_two_devices_equal_one(together: tuple[np.ndarray, np.ndarray]) -> None:
    latents, pictures = run_ours(batch_of_three(), mesh="data=2")
    assert relative_difference(latents, together[0]) < ROUNDING
    assert pixel_difference(pictures, together[1]) <= 1


def test_warm_up_changes_nothing(together: tuple[np.ndarray, np.ndarray]) -> None:
    latents, _ = run_ours(batch_of_three(), warmup_steps=2)
    assert np.array_equal(latents, together[0])


def test_guidance_1_ignores_the_negative_prompt_and_more_does_not() -> None:
    def latents(guidance: float, negative: str | None) -> np.ndarray:
        config = make_config(DEMO, guidance_scale=guidance, negative_prompt=negative)
        return run_ours(config)[0]

    assert np.array_equal(latents(1.0, "blurry"), latents(1.0, None))
    three = [latents(5.0, negative) for negative in ("blurry", "", None)]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert relative_difference(three[first], three[second]) > 1e-3


def test_a_mesh_that_cannot_be_is_one_sentence() -> None:
    assert parse_mesh("single") == {"data": 1}
    assert parse_mesh("data=4") == {"data": 4}
    for text in ("data", "data=0", "rows=2", "data=2,data=2", "data=-1", ""):
        with pytest.raises(BadSettingError, match="--mesh"):
            parse_mesh(text)
    with pytest.raises(BadSettingError, match="needs 64 devices"):
        make_mesh(parse_mesh("data=64"))
