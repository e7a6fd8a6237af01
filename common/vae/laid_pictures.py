"""Pictures and masks as the VAE takes them: brought to the run's size by diffusers' processor."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from common.errors import BadInputFileError
from common.files.input_pictures import WHITE_FROM


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Pictures as they were read, each with its mask, if the run has masks."""

    pictures: list[np.ndarray]  # [H, W, 3] uint8
    masks: list[np.ndarray]  # [H, W] uint8; none, or as many


@dataclass(frozen=True, kw_only=True)
class Laid:
    """Pictures in the run's size, I of them."""

    pictures: torch.Tensor  # [I, 3, H, W] float32 in [-1, 1]
    masks: torch.Tensor | None = None  # [I, 1, H, W] float32; not yet taken for 0 and 1
    crops: torch.Tensor | None = None  # what of each picture is laid: [I, 4], x, y, x2, y2
    soft_masks: bool = False  # whether what is between 0 and 1 counts as what it is

    @property
    def binary(self) -> torch.Tensor:
        """[I, 1, H, W] float32: 1 is made anew, 0 stays, as diffusers' `binarize`."""
        assert self.masks is not None
        return (self.masks >= 0.5).float()

    def to_encode(self) -> dict[str, np.ndarray]:
        """Pictures [I, 3, H, W] float32, by what begins the names of their latents."""
        parts = {"image_latents": self.pictures.numpy()}
        if self.masks is not None:  # zeros where something is made anew
            parts["masked_image_latents"] = (self.pictures * (self.binary < 0.5)).numpy()
        return parts

    def latent_masks(self, factor: int) -> torch.Tensor:
        """[I, 1, h, w]: those of latent cells, by the top left pixel; soft ones by the mean."""
        assert self.masks is not None
        if self.soft_masks:
            return torch.nn.functional.avg_pool2d(self.masks, factor)
        size = [extent // factor for extent in self.pictures.shape[2:]]
        return torch.nn.functional.interpolate(self.binary, size=size)


def lay(
    inputs: Inputs,
    size: tuple[int, int],
    *,
    resize_mode: str = "default",
    padding_mask_crop: int | None = None,
    soft_masks: bool = False,
    factor: int = 8,
) -> Laid:
    """Bring pictures and masks to a size (height, width), as diffusers' inpainting does.

    Args:
        padding_mask_crop: lay only what is masked and so many pixels around it, in the size's
            proportions.
        soft_masks: whether grey in masks counts as what it is.
        factor: pixels per latent cell.
    """
    height, width = size
    of_pictures = VaeImageProcessor(vae_scale_factor=factor)
    of_masks = VaeImageProcessor(
        vae_scale_factor=factor, do_normalize=False, do_convert_grayscale=True
    )
    crops: list[tuple[int, int, int, int]] = []
    white_from = 1 if soft_masks else WHITE_FROM
    if padding_mask_crop is not None:
        resize_mode = "fill"
        crops = [_crop_of(mask >= white_from, size, padding_mask_crop) for mask in inputs.masks]

    def laid(processor: Any, arrays: Sequence[np.ndarray]) -> torch.Tensor:
        each = []
        for number, array in enumerate(arrays):
            crop = crops[number] if crops else None
            if resize_mode == "fill":
                _refuse_thin(crop or (0, 0, *array.shape[1::-1]), size, number)
            each.append(
                processor.preprocess(
                    Image.fromarray(array),
                    height=height,
                    width=width,
                    resize_mode=resize_mode,
                    crops_coords=crop,
                )
            )
        return torch.cat(each)

    return Laid(
        pictures=laid(of_pictures, inputs.pictures),
        masks=laid(of_masks, inputs.masks) if inputs.masks else None,
        crops=torch.tensor(crops) if crops else None,
        soft_masks=soft_masks,
    )


def _refuse_thin(box: tuple[int, int, int, int], size: tuple[int, int], number: int) -> None:
    """Raise `BadInputFileError` for what would be less than a pixel wide or high in a size."""
    height, width = size
    own_width, own_height = box[2] - box[0], box[3] - box[1]
    if own_width * height < own_height or own_height * width < own_width:
        raise BadInputFileError(
            f"--image: of picture {number + 1} {own_width}×{own_height} are to fill {width}×"
            f"{height}, which is less than a pixel on one side: use --resize_mode default, another "
            "size or picture"
        )


def _crop_of(masked: np.ndarray, size: tuple[int, int], padding: int) -> tuple[int, int, int, int]:
    """diffusers' region; what counts as masked is what is made anew, not all that is not black."""
    height, width = size
    binary = np.where(masked, 255, 0).astype(np.uint8)
    region: tuple[int, int, int, int] = VaeImageProcessor.get_crop_region(
        Image.fromarray(binary), width, height, pad=padding
    )
    return region
