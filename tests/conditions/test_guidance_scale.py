"""A distilled UNet is told the guidance scale by diffusers' embedding."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from common.conditions.base import CONDITIONAL, ImagesOfGroup
from common.conditions.guidance_scale import GuidanceScale, embed_guidance_scale
from tests.configs import make_config
from tests.conftest import DEMO


@pytest.mark.parametrize(("scale", "dimension"), [(1.0, 16), (7.5, 256), (8.0, 33)])
def test_the_embedding_is_diffusers_own(scale: float, dimension: int) -> None:
    embed = StableDiffusionXLPipeline.get_guidance_scale_embedding
    expected = embed(StableDiffusionXLPipeline, torch.tensor([scale - 1]), dimension).numpy()
    actual = embed_guidance_scale(scale, dimension).numpy()
    # Angles of up to 7500 radians are rounded to 5e-4.
    np.testing.assert_allclose(actual, expected, atol=2e-3)
    small = slice(dimension // 4, dimension // 2)
    np.testing.assert_allclose(actual[:, small], expected[:, small], atol=1e-4)


def test_every_image_is_told_the_runs_scale() -> None:
    config = make_config(DEMO, guidance_scale=4.0)
    condition = GuidanceScale.of(config, {"time_cond_proj_dim": 32})
    assert condition is not None
    images = ImagesOfGroup(embeddings={"prompt_embeds": torch.zeros(3, 1, 1)}, dtype=torch.bfloat16)
    prepared = condition.prepare(images, CONDITIONAL)
    assert prepared["timestep_cond"].equal(embed_guidance_scale(4.0, 32).repeat(3, 1).bfloat16())
    call: dict[str, Any] = {}
    condition.tell(prepared, call)
    assert list(call) == ["timestep_cond"]


def test_a_unet_that_is_not_told_it_has_no_such_condition() -> None:
    for unet_config in ({}, {"time_cond_proj_dim": None}):
        assert GuidanceScale.of(make_config(DEMO), unet_config) is None
