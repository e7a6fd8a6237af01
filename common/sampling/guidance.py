"""Guidance as a value: which predictions a step needs, and how they are combined."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.conditions.base import CONDITIONAL, PICTURE, UNCONDITIONAL
from common.conditions.guidance_scale import is_told_guidance
from common.models.component_table import edits_pictures
from common.sampling.sampling_settings import SamplingSettings


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6), under diffusers' names."""

    scale: float
    rescale: float = 0.0
    start: float = 0.0
    end: float = 1.0

    def predictions(self, step: int, evaluations: int) -> tuple[str, ...]:
        """What a model evaluation predicts of each image.

        Like diffusers' `ClassifierFreeGuidance`, int(start·T) ≤ i < int(end·T) are guided, with T
        the number of model evaluations; none at a scale of 1 or less, as in diffusers' pipelines.
        """
        guided = range(int(self.start * evaluations), int(self.end * evaluations))
        return self.most_predictions() if step in guided else (CONDITIONAL,)

    def most_predictions(self) -> tuple[str, ...]:
        """Those of a guided step: what a mesh is chosen for."""
        return (UNCONDITIONAL, CONDITIONAL) if self.scale > 1 else (CONDITIONAL,)

    def weights(self) -> dict[str, np.ndarray]:
        """What `combine` is told: arguments of a program, so that no value is compiled in."""
        return {
            "guidance_scale": np.asarray(self.scale, np.float32),
            "guidance_rescale": np.asarray(self.rescale, np.float32),
        }

    @staticmethod
    def combine(predicted: Mapping[str, Any], weights: Mapping[str, Any], arrays: Any) -> Any:
        """The predictions as one, [B, C, h, w].

        Rescaling is Lin et al. 2023, sec. 3.4 (diffusers' `rescale_noise_cfg`).

        Args:
            predicted: each [B, C, h, w] float32, by its name.
            weights: as `weights` has them, in the backend's arrays.
            arrays: the backend's functions on arrays: `torch`, or `jax.numpy`.
        """
        positive = predicted[CONDITIONAL]
        if UNCONDITIONAL not in predicted:
            return positive
        negative = predicted[UNCONDITIONAL]
        scale, rescale = weights["guidance_scale"], weights["guidance_rescale"]
        guided = negative + scale * (positive - negative)
        return rescaled(guided, positive, rescale, arrays)


@dataclass(frozen=True, kw_only=True)
class EditGuidance(Guidance):
    """Guidance by an instruction and by the picture (Brooks et al. 2023, eq. 3)."""

    image_scale: float

    def most_predictions(self) -> tuple[str, ...]:
        """As diffusers: guided as a whole or not at all."""
        guided = self.scale > 1 and self.image_scale >= 1
        return (UNCONDITIONAL, PICTURE, CONDITIONAL) if guided else (CONDITIONAL,)

    def weights(self) -> dict[str, np.ndarray]:
        return {**super().weights(), "image_scale": np.asarray(self.image_scale, np.float32)}

    @staticmethod
    def combine(predicted: Mapping[str, Any], weights: Mapping[str, Any], arrays: Any) -> Any:
        by_both = predicted[CONDITIONAL]
        if UNCONDITIONAL not in predicted:
            return by_both
        by_picture, by_none = predicted[PICTURE], predicted[UNCONDITIONAL]
        guided = by_none + weights["guidance_scale"] * (by_both - by_picture)
        guided = guided + weights["image_scale"] * (by_picture - by_none)
        return rescaled(guided, by_both, weights["guidance_rescale"], arrays)


def rescaled(guided: Any, positive: Any, rescale: Any, arrays: Any) -> Any:
    """A guided prediction with the deviation of the conditional one, as far as is asked."""
    axes = tuple(range(1, guided.ndim))
    ratio = arrays.std(positive, axis=axes, keepdims=True) / arrays.std(
        guided, axis=axes, keepdims=True
    )
    other = rescale * guided * ratio + (1 - rescale) * guided
    return arrays.where(rescale > 0, other, guided)


def guidance_of(
    config: SamplingSettings, unet_config: Mapping[str, Any], image_scale: float
) -> Guidance:
    """The guidance of a run; a UNet that is told the scale computes no unconditional prediction.

    Args:
        image_scale: of a picture that is edited by instruction.
    """
    if is_told_guidance(unet_config):
        return Guidance(scale=1.0)
    settings = {
        "scale": config.guidance_scale,
        "rescale": config.guidance_rescale,
        "start": config.guidance_start,
        "end": config.guidance_end,
    }
    if edits_pictures(unet_config):
        return EditGuidance(**settings, image_scale=image_scale)
    return Guidance(**settings)
