"""A condition: something that the UNet is told of each image besides its latents and timestep."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from common.declared import Settings

if TYPE_CHECKING:
    import torch

# The tensor that stands beside the latents in the UNet's sample, if a condition prepares one.
CHANNELS_BESIDE = "channels_beside"
# What a step may predict; guidance combines them.
# Of an edit "conditional" is by text and picture, "picture" by the picture alone.
UNCONDITIONAL, PICTURE, CONDITIONAL = "unconditional", "picture", "conditional"


@dataclass(frozen=True, kw_only=True)
class ImagesOfGroup:
    """The images that are computed at once, as far as conditions need them."""

    embeddings: "Mapping[str, torch.Tensor]"  # stage 1's tensors, a row for each image [B, …]
    dtype: "torch.dtype"  # the model's
    masks: "torch.Tensor | None" = None  # of what is made anew, [B, 1, h, w] float32
    masked: "torch.Tensor | None" = None  # latents of the pictures without it, [B, C, h, w]
    edited: "torch.Tensor | None" = None  # latents of pictures to edit, [B, C, h, w]

    @property
    def count(self) -> int:
        """B."""
        return len(self.embeddings["prompt_embeds"])

    def of_prediction(self, name: str, prediction: str) -> "torch.Tensor":
        """An embedding's rows for a prediction, in the model's dtype."""
        sign = "" if prediction == CONDITIONAL else "negative_"
        return self.embeddings[f"{sign}{name}"].to(self.dtype)


class Condition(ABC):
    """One thing that the UNet is told, for one run; `conditions.table` lists all kinds.

    It needs no more than this: settings of its own become flags, recipes and metadata, and both
    backends prepare and tell it alike.
    """

    settings: ClassVar[type[Settings] | None] = None
    shows_masks: ClassVar[bool] = False  # whether the UNet sees what is to be made anew

    @classmethod
    @abstractmethod
    def of(cls, config: Any, unet_config: Mapping[str, Any]) -> Self | None:
        """That of a run, or None where the run or its UNet has none.

        Args:
            config: the run's settings, this condition's own among them.
        """

    @abstractmethod
    def prepare(self, images: ImagesOfGroup, prediction: str) -> "dict[str, torch.Tensor]":
        """What a prediction is told of each image: tensors [B, …] by their names."""

    @abstractmethod
    def tell(self, tensors: Mapping[str, Any], call: dict[str, Any]) -> None:
        """Add to the UNet's call, its keyword arguments.

        Args:
            tensors: all that was prepared, [N, …] with the predictions of an image beside each
                other: torch's on one backend, jax's while a program is traced on the other.
        """

    def compiled_in(self) -> Any:
        """What of it is a part of the compiled program; its tensors are arguments."""
        return type(self).__name__
