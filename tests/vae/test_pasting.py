"""What a mask leaves as it was comes back into the pictures."""

from pathlib import Path

import numpy as np
import pytest
import torch

from common.files import artifacts
from common.files.stage_table import IMAGE_LATENTS_FILE
from common.vae.pasting import PastedInto, paste

RANDOM = np.random.default_rng(8)


def test_unmasked_pixels_are_the_pictures_own() -> None:
    images = RANDOM.integers(0, 256, (2, 8, 6, 3), np.uint8)
    pictures = torch.from_numpy(RANDOM.integers(0, 256, (2, 8, 6, 3), np.uint8))
    masks = torch.zeros(2, 8, 6, dtype=torch.uint8)
    masks[0, :4], masks[1, :, :2] = 255, 255
    found = paste(images, {"pictures": pictures, "masks": masks})
    chosen = masks[..., None].numpy() > 0
    np.testing.assert_array_equal(found, np.where(chosen, images, pictures.numpy()))


def test_a_crop_goes_into_the_whole_picture() -> None:
    images = np.full((1, 8, 8, 3), 200, np.uint8)
    whole = torch.from_numpy(RANDOM.integers(0, 256, (1, 20, 24, 3), np.uint8))
    masks = torch.zeros(1, 20, 24, dtype=torch.uint8)
    masks[0, 6:9, 7:12] = 255
    begun = {
        "whole_pictures": whole,
        "whole_masks": masks,
        "crops": torch.tensor([[4, 3, 20, 19]]),
        "pictures": torch.zeros(1, 8, 8, 3, dtype=torch.uint8),
        "masks": torch.zeros(1, 8, 8, dtype=torch.uint8),
    }
    found = paste(images, begun)
    chosen = masks[..., None].numpy() > 0
    np.testing.assert_array_equal(found, np.where(chosen, 200, whole.numpy()))


@pytest.mark.parametrize(("begun", "rows"), [(1, [0, 0, 0]), (3, [0, 1, 2])])
def test_each_image_is_pasted_into_its_own(tmp_path: Path, begun: int, rows: list[int]) -> None:
    """Six images: two of each of three pictures, or all of one."""
    path = tmp_path / IMAGE_LATENTS_FILE
    pictures = torch.arange(begun, dtype=torch.uint8)[:, None, None, None].repeat(1, 4, 4, 3)
    masks = torch.zeros(begun, 4, 4, dtype=torch.uint8)
    artifacts.save_whole(path, {"pictures": pictures, "masks": masks}, {})
    into = PastedInto.of(artifacts.inspect(path), [0, 0, 1, 1, 2, 2])
    found = into.paste([0, 3, 5], np.full((3, 4, 4, 3), 200, np.uint8))
    assert found[:, 0, 0, 0].tolist() == rows
    kept = np.full((1, 4, 4, 3), 200, np.uint8)
    np.testing.assert_array_equal(PastedInto.of(None, [0] * 6).paste([2], kept), kept)
