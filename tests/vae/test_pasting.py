"""What a mask leaves as it was comes back into the pictures."""

import numpy as np
import torch

from common.vae.pasting import paste

RANDOM = np.random.default_rng(8)


def test_unmasked_pixels_are_the_pictures_own() -> None:
    """Two images of each of two pictures."""
    images = RANDOM.integers(0, 256, (4, 8, 6, 3), np.uint8)
    pictures = torch.from_numpy(RANDOM.integers(0, 256, (2, 8, 6, 3), np.uint8))
    masks = torch.zeros(2, 8, 6, dtype=torch.uint8)
    masks[0, :4], masks[1, :, :2] = 255, 255
    found = paste(images, {"pictures": pictures, "masks": masks})
    for index in range(4):
        row = index // 2
        chosen = masks[row, ..., None].numpy() > 0
        expected = np.where(chosen, images[index], pictures[row].numpy())
        np.testing.assert_array_equal(found[index], expected)


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
