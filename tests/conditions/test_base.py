"""What a condition is given of the images, and what it says of itself."""

import pytest
import torch

from common.conditions.base import CONDITIONAL, UNCONDITIONAL, Condition, ImagesOfGroup
from common.conditions.prompt_condition import PromptCondition
from common.conditions.sizes import SizeCondition
from common.conditions.table import CONDITIONS
from common.declared import declarations


def images(dtype: torch.dtype = torch.float32) -> ImagesOfGroup:
    embeddings = {
        "prompt_embeds": torch.full((3, 2, 4), 1.001),
        "negative_prompt_embeds": torch.full((3, 2, 4), -1.001),
    }
    return ImagesOfGroup(embeddings=embeddings, dtype=dtype)


def test_a_prediction_has_its_own_embeddings() -> None:
    group = images()
    assert group.count == 3
    positive = group.of_prediction("prompt_embeds", CONDITIONAL)
    negative = group.of_prediction("prompt_embeds", UNCONDITIONAL)
    assert positive.equal(group.embeddings["prompt_embeds"]) and positive.equal(-negative)


def test_embeddings_have_the_models_dtype() -> None:
    group = images(torch.bfloat16)
    for prediction in (CONDITIONAL, UNCONDITIONAL):
        found = group.of_prediction("prompt_embeds", prediction)
        assert found.dtype == torch.bfloat16 and found.abs().unique().tolist() == [1.0]


def test_a_condition_is_compiled_in_by_its_kind_alone() -> None:
    """Its values are arguments of the program."""
    sizes = [
        SizeCondition({"time_ids": [size] * 6, "negative_time_ids": [size] * 6}).compiled_in()
        for size in (64, 1024)
    ]
    assert sizes[0] == sizes[1] != PromptCondition().compiled_in()


@pytest.mark.parametrize("kind", CONDITIONS)
def test_a_kinds_settings_all_have_a_flag(kind: type[Condition]) -> None:
    if kind.settings is not None:
        assert {name for name, _ in declarations(kind.settings)} == set(kind.settings.model_fields)
