"""Pictures and masks are laid into a size as diffusers' inpainting lays them."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLInpaintPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from common.errors import BadInputFileError
from common.vae.laid_pictures import Inputs, lay
from tests.refusals import refusal
from tests.tiny_checkpoints import save_sdxl

RANDOM = np.random.default_rng(5)
PICTURES = [RANDOM.integers(0, 256, (50, 70, 3), np.uint8) for _ in range(2)]
SIZE = (64, 48)


def mask_of(*rows: slice) -> np.ndarray:
    mask = np.zeros((50, 70), np.uint8)
    for each in rows:
        mask[each, 20:30] = 255
    return mask


MASKS = [mask_of(slice(5, 20)), mask_of(slice(30, 44))]


def prepared_by_diffusers(processor: Any, arrays: list[np.ndarray], **options: Any) -> torch.Tensor:
    opened = [Image.fromarray(array) for array in arrays]
    found: torch.Tensor = processor.preprocess(opened, height=64, width=48, **options)
    return found


@pytest.mark.parametrize("mode", ["default", "fill", "crop"])
def test_pictures_and_masks_are_those_of_diffusers_processors(mode: str) -> None:
    laid = lay(Inputs(pictures=PICTURES, masks=MASKS), SIZE, resize_mode=mode)
    processor = VaeImageProcessor(vae_scale_factor=8)
    of_masks = VaeImageProcessor(
        vae_scale_factor=8, do_normalize=False, do_binarize=True, do_convert_grayscale=True
    )
    expected = prepared_by_diffusers(processor, PICTURES, resize_mode=mode)
    assert laid.pictures.equal(expected) and laid.pictures.shape == (2, 3, *SIZE)
    binary = prepared_by_diffusers(of_masks, MASKS, resize_mode=mode)
    assert laid.binary.equal(binary) and laid.crops is None
    parts = laid.to_encode()
    np.testing.assert_array_equal(parts["image_latents"], expected.numpy())
    masked = expected * (binary < 0.5)
    np.testing.assert_array_equal(parts["masked_image_latents"], masked.numpy())
    cells = torch.nn.functional.interpolate(binary, size=(8, 6))
    assert laid.latent_masks(8).equal(cells)


@pytest.mark.parametrize("shape", [(1, 500), (500, 1)])
def test_a_picture_too_thin_to_fill_the_size_is_told(shape: tuple[int, int]) -> None:
    """Pillow's own words are of widths that must not be 0."""
    inputs = Inputs(pictures=[np.zeros((*shape, 3), np.uint8)], masks=[])
    with refusal(BadInputFileError, "picture 1", "are to fill 48×64", "--resize_mode default"):
        lay(inputs, SIZE, resize_mode="fill")
    assert lay(inputs, SIZE).pictures.shape == (1, 3, *SIZE)


def test_soft_masks_are_their_cells_means() -> None:
    grey = [mask // 3 for mask in MASKS]
    laid = lay(Inputs(pictures=PICTURES, masks=grey), SIZE, soft_masks=True)
    assert laid.masks is not None
    cells = laid.masks.reshape(2, 1, 8, 8, 6, 8).mean((3, 5))
    assert torch.allclose(laid.latent_masks(8), cells) and 0 < float(cells.max()) < 0.34
    hard = lay(Inputs(pictures=PICTURES, masks=MASKS), SIZE, padding_mask_crop=3)
    soft = lay(Inputs(pictures=PICTURES, masks=grey), SIZE, padding_mask_crop=3, soft_masks=True)
    assert hard.crops is not None and soft.crops is not None and hard.crops.equal(soft.crops)


def test_without_masks_there_is_one_part() -> None:
    laid = lay(Inputs(pictures=PICTURES, masks=[]), SIZE)
    assert laid.masks is None and list(laid.to_encode()) == ["image_latents"]


def test_a_crop_is_diffusers_own_of_a_binary_mask() -> None:
    laid = lay(Inputs(pictures=PICTURES, masks=MASKS), SIZE, padding_mask_crop=3)
    processor = VaeImageProcessor(vae_scale_factor=8)
    assert laid.crops is not None
    for number, mask in enumerate(MASKS):
        region = processor.get_crop_region(Image.fromarray(mask), 48, 64, pad=3)
        assert tuple(laid.crops[number].tolist()) == region
        expected = processor.preprocess(
            Image.fromarray(PICTURES[number]),
            height=64,
            width=48,
            crops_coords=region,
            resize_mode="fill",
        )
        assert laid.pictures[number].equal(expected[0])


def test_what_is_hardly_grey_does_not_widen_a_crop() -> None:
    """diffusers takes every pixel that is not black."""
    faint = MASKS[0].copy()
    faint[49, 69] = 1
    crops = [
        lay(Inputs(pictures=PICTURES[:1], masks=[mask]), SIZE, padding_mask_crop=3).crops
        for mask in (MASKS[0], faint)
    ]
    assert crops[0] is not None and crops[1] is not None and crops[0].equal(crops[1])


def test_a_pipeline_has_the_processors_that_are_asked_here(tmp_path: Any) -> None:
    pipeline: Any = StableDiffusionXLInpaintPipeline.from_pretrained(save_sdxl(tmp_path))
    config = dict(pipeline.mask_processor.config)
    assert config["do_binarize"] and config["do_convert_grayscale"] and not config["do_normalize"]
    assert pipeline.image_processor.config.vae_scale_factor == 8
