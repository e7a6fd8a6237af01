"""SDXL's size conditions are those of diffusers' pipeline, and settings of SDXL alone."""

from typing import Any

import pytest
import torch

from common.conditions.base import CONDITIONAL, UNCONDITIONAL, ImagesOfGroup
from common.conditions.sizes import SizeCondition, SizeSettings, recorded_sizes, time_ids
from common.declared import validate
from common.errors import BadSettingError
from tests.configs import make_config
from tests.conftest import DEMO
from tests.in_process import load_pipeline
from tests.refusals import refusal
from tests.tiny_checkpoints import save_sdxl

SDXL = {"addition_embed_type": "text_time"}
GIVEN: list[dict[str, Any]] = [
    {},
    {"original_size": (512, 768), "target_size": (64, 96)},
    {"crops_coords_top_left": (16, 32), "target_size": (200, 100)},
    {
        "negative_original_size": (32, 48),
        "negative_target_size": (64, 65),
        "negative_crops_coords_top_left": (8, 9),
    },
    # The pipeline wants both sizes for the unconditional half to have its own.
    {"negative_original_size": (32, 48)},
    {"negative_target_size": (64, 65), "original_size": (1, 2)},
    {"negative_crops_coords_top_left": (8, 9)},
]


class ToldError(Exception):
    """Ends a pipeline where it calls its UNet."""


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """diffusers' own, whose UNet raises what it is told."""

    def tell(*_: Any, added_cond_kwargs: dict[str, Any], **__: Any) -> None:
        raise ToldError(added_cond_kwargs["time_ids"])

    found = load_pipeline(save_sdxl(tmp_path_factory.mktemp("tiny") / "sdxl"))
    found.unet.forward = tell
    return found


@pytest.mark.parametrize("settings", GIVEN, ids=str)
def test_sizes_are_those_of_diffusers_pipeline(pipeline: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(ToldError) as told:
        pipeline("a ring", height=96, width=128, guidance_scale=2.0, **settings)
    by_diffusers = told.value.args[0].tolist()
    config = make_config(DEMO, height=96, width=128, **settings)
    condition = SizeCondition.of(config, SDXL)
    assert condition is not None
    names = ("prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    embeddings = {name: torch.randn(2, 6) for name in names}
    images = ImagesOfGroup(embeddings=embeddings, dtype=torch.bfloat16)
    predictions = ((UNCONDITIONAL, "negative_"), (CONDITIONAL, ""))
    for (prediction, sign), expected in zip(predictions, by_diffusers, strict=True):
        assert time_ids(config, {})[f"{sign}time_ids"] == expected
        prepared = condition.prepare(images, prediction)
        assert prepared["time_ids"].tolist() == [expected, expected]
        assert prepared["time_ids"].dtype == torch.float32  # bfloat16 would round 1001 to 1000
        pooled = embeddings[f"{sign}pooled_prompt_embeds"]
        assert prepared["text_embeds"].equal(pooled.bfloat16())
        call: dict[str, Any] = {}
        condition.tell({**prepared, "prompt_embeds": None}, call)
        assert list(call) == ["added_cond_kwargs"]
        assert set(call["added_cond_kwargs"]) == {"text_embeds", "time_ids"}
    assert recorded_sizes(config, SDXL, "sdxl") == time_ids(config, {})


def test_other_unets_take_no_sizes() -> None:
    for unet_config in ({}, {"addition_embed_type": None}):
        assert SizeCondition.of(make_config(DEMO), unet_config) is None
        assert recorded_sizes(make_config(DEMO), unet_config, "sd") == {}
        for settings in GIVEN[1:]:
            name = min(settings, key=list(SizeSettings.model_fields).index)
            with refusal(BadSettingError, f"--{name} is for SDXL checkpoints; the UNet of sd"):
                recorded_sizes(make_config(DEMO, **settings), unet_config, "sd")


@pytest.mark.parametrize("value", ["640,480", [640, 480], "640, 480"])
def test_a_size_is_two_numbers(value: Any) -> None:
    found = validate(SizeSettings, {"original_size": value}, "flags")
    assert found.original_size == (640, 480)


@pytest.mark.parametrize("value", ["640", "1,2,3", [640], "640,x", "1000001,1", "-1000001,1"])
def test_all_else_is_refused_in_words(value: Any) -> None:
    with refusal(BadSettingError, "--original_size "):
        validate(SizeSettings, {"original_size": value}, "flags")
