"""The prompts' embeddings, as the UNet is told them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from common.conditions.base import Condition, ImagesOfGroup
from common.conditions.prompt_settings import PromptOptions

if TYPE_CHECKING:
    import torch


class PromptCondition(Condition):
    """Cross-attention to each image's prompt."""

    settings = PromptOptions

    @classmethod
    def of(cls, config: Any, unet_config: Mapping[str, Any]) -> Self:
        return cls()

    def prepare(self, images: ImagesOfGroup, prediction: str) -> "dict[str, torch.Tensor]":
        """prompt_embeds [B, L, D]."""
        return {"prompt_embeds": images.of_prediction("prompt_embeds", prediction)}

    def tell(self, tensors: Mapping[str, Any], call: dict[str, Any]) -> None:
        call["encoder_hidden_states"] = tensors["prompt_embeds"]
