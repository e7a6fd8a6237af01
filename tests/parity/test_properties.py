"""Whatever the prompts, sizes and groups are, the result is diffusers'."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.conditions.prompts import embeddings_names, encode_prompts
from tests.conftest import LONG
from tests.in_process import (
    Ours,
    load_pipeline,
    make_config,
    pixel_difference,
    relative_difference,
    run_pipeline,
)
from tests.tiny_checkpoints import save_sd, save_sdxl


class Both:
    """A checkpoint by diffusers and by the stages, with 1 to 3 pictures in a group."""

    def __init__(self, model: Path) -> None:
        self.model = model
        self.pipeline: Any = load_pipeline(model)
        self.ours = {size: Ours(model, batch_size=size) for size in (1, 2, 3)}


@pytest.fixture(scope="module", params=["SDXL", pytest.param("SD", marks=LONG)])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    save = {"SDXL": save_sdxl, "SD": save_sd}[request.param]
    return Both(save(tmp_path_factory.mktemp("tiny") / request.param))


texts = st.text(max_size=120)
several = st.integers(1, 3).flatmap(
    lambda count: st.tuples(
        st.lists(texts, min_size=count, max_size=count),
        st.none() | st.lists(texts, min_size=count, max_size=count),
    )
)


@given(several)
@settings(deadline=None, max_examples=60)
def test_any_prompts_encode_as_in_diffusers(
    both: Both, prompts: tuple[list[str], list[str] | None]
) -> None:
    positive, negative = prompts
    config = make_config(
        both.model,
        prompts=[
            {"prompt": text, "negative_prompt": None if negative is None else negative[index]}
            for index, text in enumerate(positive)
        ],
    )
    encoded = encode_prompts(both.ours[1].text_pipeline, config)
    with torch.no_grad():
        expected = both.pipeline.encode_prompt(
            prompt=positive,
            negative_prompt=negative,
            device=torch.device("cpu"),
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
        )
    for name, tensor in zip(embeddings_names(both.pipeline), expected, strict=True):
        torch.testing.assert_close(encoded[name], tensor, rtol=1e-4, atol=1e-5)


@given(
    size=st.sampled_from([1, 2, 3]),
    prompts=st.integers(1, 3),
    images=st.integers(1, 3),
    seed=st.integers(0, 2**63 - 100),
    own_seed=st.none() | st.integers(0, 2**63 - 100),
)
@settings(deadline=None, max_examples=12)
def test_any_groups_give_the_images_made_alone(
    both: Both, size: int, prompts: int, images: int, seed: int, own_seed: int | None
) -> None:
    texts = ["a red star", "a ring", "a cross"][:prompts]
    config = make_config(
        both.model,
        height=64,
        width=64,
        num_inference_steps=2,
        seed=seed,
        num_images_per_prompt=images,
        prompts=[{"prompt": t, "negative_prompt": "blurry", "seed": own_seed} for t in texts],
    )
    latents = both.ours[size].denoise(config)
    assert len(latents) == prompts * images
    for index in (0, len(latents) - 1):
        alone = config.model_copy(
            update={
                "prompts": (config.prompts[index // images].model_copy(update={"seed": None}),),
                "num_images_per_prompt": 1,
                "seed": config.image_seeds()[index],
            }
        )
        assert relative_difference(latents[index], both.ours[1].denoise(alone)[0]) < 1e-5


@given(height=st.integers(1, 16), width=st.integers(1, 16))
@settings(deadline=None, max_examples=3)
def test_any_size_equals_diffusers(both: Both, height: int, width: int) -> None:
    config = make_config(
        both.model, height=8 * height, width=8 * width, num_inference_steps=2, batch=1
    )
    latents = both.ours[1].denoise(config)
    expected, pictures = run_pipeline(both.pipeline, config)
    assert relative_difference(latents, expected) < 1e-4
    assert pixel_difference(both.ours[1].decode(latents), pictures) <= 2
