"""The guidance scale, as distilled UNets (LCM) are told it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from common.conditions.base import Condition, ImagesOfGroup

if TYPE_CHECKING:
    import torch


class GuidanceScale(Condition):
    """The scale as an embedding; such a UNet computes no unconditional prediction."""

    def __init__(self, scale: float, dimension: int) -> None:
        self.scale, self.dimension = scale, dimension

    @classmethod
    def of(cls, config: Any, unet_config: Mapping[str, Any]) -> Self | None:
        if not is_told_guidance(unet_config):
            return None
        return cls(config.guidance_scale, unet_config["time_cond_proj_dim"])

    def prepare(self, images: ImagesOfGroup, prediction: str) -> "dict[str, torch.Tensor]":
        """timestep_cond [B, G]."""
        embedded = embed_guidance_scale(self.scale, self.dimension)
        return {"timestep_cond": embedded.repeat(images.count, 1).to(images.dtype)}

    def tell(self, tensors: Mapping[str, Any], call: dict[str, Any]) -> None:
        call["timestep_cond"] = tensors["timestep_cond"]


def is_told_guidance(unet_config: Mapping[str, Any]) -> bool:
    """Whether a UNet takes the guidance scale as an embedding."""
    return unet_config.get("time_cond_proj_dim") is not None


def embed_guidance_scale(scale: float, dimension: int) -> "torch.Tensor":
    """The guidance scale as distilled UNets (LCM) take it: [1, dimension] float32.

    That of scale − 1 in diffusers' `get_guidance_scale_embedding`, but for the rounding of angles
    of thousands of radians; that one stands in a module that imports text encoders.
    """
    import torch
    from diffusers.models.embeddings import get_timestep_embedding

    weight = torch.tensor([(scale - 1) * 1000.0])
    return get_timestep_embedding(weight, dimension, downscale_freq_shift=1)
