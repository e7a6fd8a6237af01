"""Pasting what stays of pictures over what was made anew, by diffusers' `apply_overlay`."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from common.files.tensor_rows import names_as_given

if TYPE_CHECKING:
    import torch


def paste(images: np.ndarray, begun: "Mapping[str, torch.Tensor]") -> np.ndarray:
    """Pictures [B, H, W, 3] uint8 with all that their masks leave as it was.

    Args:
        begun: stage 0's tensors: pictures and masks in the run's size; or whole pictures, of which
            the run made a crop, into which it is pasted.

    Returns:
        [B, H, W, 3] uint8, in the whole pictures' size where there are crops.
    """
    from diffusers.image_processor import VaeImageProcessor
    from PIL import Image

    crops = begun.get("crops")
    pictures, masks = (begun[name].numpy() for name in names_as_given(begun))
    processor, images_of_each = VaeImageProcessor(), len(images) // len(pictures)
    pasted = []
    for index, image in enumerate(images):
        row = index // images_of_each
        overlaid = processor.apply_overlay(
            Image.fromarray(masks[row]),
            Image.fromarray(pictures[row]),
            Image.fromarray(image),
            None if crops is None else tuple(crops[row].tolist()),
        )
        pasted.append(np.asarray(overlaid))
    return np.stack(pasted)
