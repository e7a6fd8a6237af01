"""What the UNet is told of each image besides its latents: for both backends."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from common.conditions.base import CHANNELS_BESIDE, Condition, ImagesOfGroup


def prepare_conditions(
    conditions: Sequence[Condition], images: ImagesOfGroup, predictions: Sequence[str]
) -> dict[str, torch.Tensor]:
    """All conditions' tensors for some predictions, [N, …] with N = images · predictions.

    The predictions of an image lie beside each other, [image, prediction], so that a batch split
    over devices stays whole there.
    """
    tensors: dict[str, torch.Tensor] = {}
    for condition in conditions:
        each = [condition.prepare(images, prediction) for prediction in predictions]
        for name in each[0]:
            tensors[name] = torch.stack([rows[name] for rows in each], 1).flatten(0, 1)
    return tensors


def unet_call(conditions: Sequence[Condition], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The UNet's keyword arguments besides its sample and timestep, in either backend's arrays."""
    call: dict[str, Any] = {"return_dict": False}
    for condition in conditions:
        condition.tell(tensors, call)
    return call


def unet_sample(latents: Any, tensors: Mapping[str, Any], arrays: Any) -> Any:
    """The UNet's sample: the latents [N, C, h, w], and the channels that stand beside them.

    Args:
        latents: scaled, and in the model's dtype.
        arrays: the backend's functions on arrays: `torch`, or `jax.numpy`.
    """
    beside = tensors.get(CHANNELS_BESIDE)
    return latents if beside is None else arrays.concatenate([latents, beside], 1)
