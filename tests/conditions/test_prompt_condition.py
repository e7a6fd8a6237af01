"""A UNet attends to each image's prompt."""

import torch

from common.conditions.base import CONDITIONAL, UNCONDITIONAL, ImagesOfGroup
from common.conditions.prompt_condition import PromptCondition


def test_the_prompts_embeddings_are_what_the_unet_attends_to() -> None:
    embeddings = {
        name: torch.randn(2, 7, 4) for name in ("prompt_embeds", "negative_prompt_embeds")
    }
    condition = PromptCondition.of(None, {})
    images = ImagesOfGroup(embeddings=embeddings, dtype=torch.float16)
    for prediction, name in (
        (CONDITIONAL, "prompt_embeds"),
        (UNCONDITIONAL, "negative_prompt_embeds"),
    ):
        prepared = condition.prepare(images, prediction)
        assert list(prepared) == ["prompt_embeds"]
        call = {"timestep_cond": 1}
        condition.tell(prepared, call)
        assert call.pop("timestep_cond") == 1  # of another condition
        (told,) = call.values()
        assert list(call) == ["encoder_hidden_states"]
        assert told.equal(embeddings[name].half())  # type: ignore[attr-defined]
