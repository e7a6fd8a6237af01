"""Pasting what stays of pictures over what was made anew, by diffusers' `apply_overlay`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Self

import numpy as np

from common.files.artifacts import Artifact
from common.files.row_reader import RowReader
from common.files.tensor_rows import names_as_given, row_of_picture
from common.messages import warn

if TYPE_CHECKING:
    import torch


class PastedInto:
    """What a run's pictures are pasted into, if they are: a row for each prompt, or one for all."""

    def __init__(self, rows: RowReader | None, prompt_of: Sequence[int]) -> None:
        self._rows, self._prompt_of = rows, prompt_of

    @classmethod
    def of(cls, begun: Artifact | None, prompt_of: Sequence[int]) -> Self:
        """Stage 0's file, or none.

        Args:
            prompt_of: each image's prompt.
        """
        return cls(None if begun is None else RowReader(begun, warn), prompt_of)

    def paste(self, images: Sequence[int], pixels: np.ndarray) -> np.ndarray:
        """Some images' pictures [N, H, W, 3] uint8, pasted."""
        if self._rows is None:
            return pixels
        places = [row_of_picture(self._prompt_of[k], len(self._rows.sizes[0])) for k in images]
        return paste(pixels, self._rows.read(places))


def paste(images: np.ndarray, begun: "Mapping[str, torch.Tensor]") -> np.ndarray:
    """Pictures [B, H, W, 3] uint8 with all that their masks leave as it was.

    Args:
        begun: stage 0's tensors, a row for each: pictures and masks in the run's size; or whole
            pictures, of which the run made a crop, into which it is pasted.

    Returns:
        [B, H, W, 3] uint8, in the whole pictures' size where there are crops.
    """
    from diffusers.image_processor import VaeImageProcessor
    from PIL import Image

    crops = begun.get("crops")
    pictures, masks = (begun[name].numpy() for name in names_as_given(begun))
    processor, pasted = VaeImageProcessor(), []
    for row, image in enumerate(images):
        overlaid = processor.apply_overlay(
            Image.fromarray(masks[row]),
            Image.fromarray(pictures[row]),
            Image.fromarray(image),
            None if crops is None else tuple(crops[row].tolist()),
        )
        pasted.append(np.asarray(overlaid))
    return np.stack(pasted)
