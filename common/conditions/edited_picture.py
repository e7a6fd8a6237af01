"""The picture that is edited by instruction, as InstructPix2Pix's UNets are shown it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from common.conditions.base import CHANNELS_BESIDE, UNCONDITIONAL, Condition, ImagesOfGroup
from common.declared import INPUT, LATENTS, Settings, setting
from common.models.component_table import edits_pictures

if TYPE_CHECKING:
    import torch


class EditSettings(Settings):
    """How an edit keeps to its picture."""

    image_guidance_scale: float = setting(  # of UNets of eight channels
        1.5,
        "Guidance by an edited picture.",
        metavar="X",
        group=INPUT,
        shapes=(LATENTS,),
        of_prompts=True,
        web_ui="Image CFG scale",
        ge=0,
    )


class EditedPicture(Condition):
    """Channels beside the latents: those of the picture, zeros where nothing is told of it."""

    settings = EditSettings

    @classmethod
    def of(cls, config: Any, unet_config: Mapping[str, Any]) -> Self | None:
        return cls() if edits_pictures(unet_config) else None

    def prepare(self, images: ImagesOfGroup, prediction: str) -> "dict[str, torch.Tensor]":
        """[B, C, h, w]."""
        assert images.edited is not None
        shown = images.edited * 0 if prediction == UNCONDITIONAL else images.edited
        return {CHANNELS_BESIDE: shown.to(images.dtype)}

    def tell(self, tensors: Mapping[str, Any], call: dict[str, Any]) -> None:
        """The sample has them, not the call."""
