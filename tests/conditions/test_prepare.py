"""What the UNet is told in one call is what diffusers' UNet is told image by image."""

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from common.conditions.base import CONDITIONAL, UNCONDITIONAL, Condition, ImagesOfGroup
from common.conditions.guidance_scale import GuidanceScale, embed_guidance_scale
from common.conditions.prepare import prepare_conditions, unet_call
from common.conditions.prompt_condition import PromptCondition
from common.conditions.sizes import SizeCondition

BOTH = (UNCONDITIONAL, CONDITIONAL)
TIME_IDS = {"time_ids": [64, 64, 0, 0, 64, 64], "negative_time_ids": [32, 48, 8, 4, 64, 64]}
CONDITIONS = [PromptCondition(), SizeCondition(TIME_IDS), GuidanceScale(7.5, 6)]


@pytest.fixture(scope="module")
def images() -> ImagesOfGroup:
    generator = torch.Generator().manual_seed(1)
    shapes = {"prompt_embeds": (3, 5, 12), "pooled_prompt_embeds": (3, 6)}
    embeddings = {
        f"{sign}{name}": torch.randn(*shape, generator=generator)
        for name, shape in shapes.items()
        for sign in ("", "negative_")
    }
    return ImagesOfGroup(embeddings=embeddings, dtype=torch.float32)


def test_the_predictions_of_an_image_lie_beside_each_other(images: ImagesOfGroup) -> None:
    both = prepare_conditions(CONDITIONS, images, BOTH)
    each = {p: prepare_conditions(CONDITIONS, images, (p,)) for p in BOTH}
    assert set(both) == {"prompt_embeds", "text_embeds", "time_ids", "timestep_cond"}
    for name, tensor in both.items():
        assert len(tensor) == 6
        for k, prediction in enumerate(BOTH):
            assert tensor[k::2].equal(each[prediction][name])
    assert both["prompt_embeds"][3].equal(images.embeddings["prompt_embeds"][1])
    assert both["prompt_embeds"][2].equal(images.embeddings["negative_prompt_embeds"][1])


def unet_with(**changes: Any) -> Any:
    torch.manual_seed(4)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=12,
        **changes,
    )


SDXL = dict(
    addition_embed_type="text_time",
    addition_time_embed_dim=4,
    projection_class_embeddings_input_dim=6 + 6 * 4,
)


@torch.no_grad()
@pytest.mark.parametrize(
    ("conditions", "changes"),
    [
        (CONDITIONS[:1], {}),
        (CONDITIONS[:2], SDXL),
        ([CONDITIONS[0], CONDITIONS[2]], {"time_cond_proj_dim": 6}),
        (CONDITIONS, {**SDXL, "time_cond_proj_dim": 6}),
    ],
    ids=["SD", "SDXL", "distilled SD", "distilled SDXL"],
)
def test_one_call_equals_diffusers_unet_called_for_each_prediction(
    images: ImagesOfGroup, conditions: list[Condition], changes: dict[str, Any]
) -> None:
    unet, timestep = unet_with(**changes), torch.tensor(301.0)
    scale = embed_guidance_scale(7.5, 6)
    samples = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    call = unet_call(conditions, prepare_conditions(conditions, images, BOTH))
    (found,) = unet(samples.repeat_interleave(2, 0), timestep, **call)
    for index in range(3):
        for k, sign in enumerate(("negative_", "")):
            expected = unet(
                samples[[index]],
                timestep,
                images.embeddings[f"{sign}prompt_embeds"][[index]],
                added_cond_kwargs={
                    "text_embeds": images.embeddings[f"{sign}pooled_prompt_embeds"][[index]],
                    "time_ids": torch.tensor([TIME_IDS[f"{sign}time_ids"]], dtype=torch.float32),
                },
                timestep_cond=scale if "time_cond_proj_dim" in changes else None,
            ).sample[0]
            torch.testing.assert_close(found[2 * index + k], expected, rtol=1e-4, atol=1e-5)


def test_no_condition_tells_nothing() -> None:
    assert unet_call([], {}) == {"return_dict": False}
