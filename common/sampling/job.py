"""What a run asks a denoiser to compute."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from common.conditions.base import Condition, ImagesOfGroup
from common.models.model_settings import LoraFile
from common.sampling.beginning import Beginning, First, FromNoise
from common.sampling.guidance import Guidance
from common.sampling.sampler import Sampler

if TYPE_CHECKING:
    import numpy as np
    import torch


class HasRows(Protocol):
    """A tensor [N, …], in memory or in a file."""

    def __getitem__(self, places: Any) -> "torch.Tensor":
        """Some of its rows, by their indices."""


@dataclass(frozen=True, kw_only=True)
class DenoisingJob:
    """All images of a run, B of them for P prompts."""

    embeddings: Mapping[str, HasRows]  # stage 1's tensors, a row for each prompt [P, …]
    prompt_of: "np.ndarray"  # the prompt of every image, [B]
    seeds: list[int]  # [B]
    latent_shape: tuple[int, int, int]  # of one image, [C, h, w]
    sampler: Sampler
    guidance: Guidance
    conditions: tuple[Condition, ...]
    prompts: list[str] = field(default_factory=list)  # to say what is at work [P]
    begin: Beginning = field(default_factory=FromNoise)
    loras: tuple[LoraFile, ...] = ()  # added to the UNet
    # Those of the images that have these settings; None: all.
    chosen: list[int] | None = None

    @property
    def own(self) -> list[int]:
        """The images that have these settings."""
        return [*range(len(self.seeds))] if self.chosen is None else self.chosen

    def images(
        self, chosen: "np.ndarray", dtype: "torch.dtype", first: First | None = None
    ) -> ImagesOfGroup:
        """Some images, by their indices, as far as conditions need them.

        Args:
            first: what they begin with.
        """
        rows = {name: tensor[self.prompt_of[chosen]] for name, tensor in self.embeddings.items()}
        masks = None if self.begin.masks is None else self.begin.masks[chosen]
        shown = {} if first is None else {"masked": first.masked, "edited": first.edited}
        return ImagesOfGroup(embeddings=rows, dtype=dtype, masks=masks, **shown)

    @property
    def soft_masks(self) -> bool:
        """Whether masks say for how many of the steps a part stays."""
        return self.begin.soft_masks

    @property
    def keeps_area(self) -> bool:
        """Whether a part of each image stays what it is, which no UNet is told of."""
        return self.begin.masks is not None and not any(
            condition.shows_masks for condition in self.conditions
        )
