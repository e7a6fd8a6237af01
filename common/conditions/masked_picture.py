"""The mask and the masked picture, as UNets for inpainting are shown them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from common.conditions.base import CHANNELS_BESIDE, Condition, ImagesOfGroup
from common.models.component_table import is_shown_masks

if TYPE_CHECKING:
    import torch


class MaskedPicture(Condition):
    """Channels beside the latents: the mask, and the latents of the picture without it."""

    shows_masks = True

    @classmethod
    def of(cls, config: Any, unet_config: Mapping[str, Any]) -> Self | None:
        return cls() if is_shown_masks(unet_config) else None

    def prepare(self, images: ImagesOfGroup, prediction: str) -> "dict[str, torch.Tensor]":
        """[B, 1 + C, h, w], the same for all predictions."""
        import torch

        assert images.masks is not None and images.masked is not None
        return {CHANNELS_BESIDE: torch.cat([images.masks, images.masked], 1).to(images.dtype)}

    def tell(self, tensors: Mapping[str, Any], call: dict[str, Any]) -> None:
        """The sample has them, not the call."""
