"""What a run asks a denoiser to compute."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.conditions.base import Condition, ImagesOfGroup
from common.sampling.guidance import Guidance
from common.sampling.sampler import Sampler

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclass(frozen=True, kw_only=True)
class DenoisingJob:
    """All images of a run, B of them for P prompts."""

    embeddings: "dict[str, torch.Tensor]"  # stage 1's tensors, a row for each prompt [P, …]
    prompt_of: "np.ndarray"  # the prompt of every image, [B]
    seeds: list[int]  # [B]
    latent_shape: tuple[int, int, int]  # of one image, [C, h, w]
    sampler: Sampler
    guidance: Guidance
    conditions: tuple[Condition, ...]
    init_latents: "torch.Tensor | None" = None  # to begin with, [B, C, h, w] float32

    def images(self, chosen: "np.ndarray", dtype: "torch.dtype") -> ImagesOfGroup:
        """Some images, by their indices, as far as conditions need them."""
        rows = {name: tensor[self.prompt_of[chosen]] for name, tensor in self.embeddings.items()}
        return ImagesOfGroup(embeddings=rows, dtype=dtype)
