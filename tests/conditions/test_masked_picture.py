"""What UNets for inpainting are shown beside the latents."""

import torch

from common.conditions.base import CHANNELS_BESIDE, CONDITIONAL, UNCONDITIONAL, ImagesOfGroup
from common.conditions.masked_picture import MaskedPicture
from common.conditions.prepare import prepare_conditions, unet_call, unet_sample


def test_unets_of_nine_channels_have_it() -> None:
    assert MaskedPicture.of(None, {"in_channels": 9, "out_channels": 4}) is not None
    assert MaskedPicture.of(None, {"in_channels": 4, "out_channels": 4}) is None
    assert MaskedPicture.of(None, {}) is None


def test_the_mask_stands_before_the_picture_for_every_prediction() -> None:
    masks, masked = torch.ones(2, 1, 3, 5), torch.rand(2, 4, 3, 5)
    embeddings = {"prompt_embeds": torch.zeros(2, 1, 1)}
    images = ImagesOfGroup(embeddings=embeddings, dtype=torch.bfloat16, masks=masks, masked=masked)
    own = [MaskedPicture()]
    tensors = prepare_conditions(own, images, (UNCONDITIONAL, CONDITIONAL))
    assert unet_call(own, tensors) == {"return_dict": False}
    latents = torch.zeros(4, 4, 3, 5, dtype=torch.bfloat16)
    sample = unet_sample(latents, tensors, torch)
    assert sample.shape == (4, 9, 3, 5) and sample.dtype == torch.bfloat16
    for row, image in enumerate((0, 0, 1, 1)):
        assert sample[row, 4].eq(1).all()
        assert sample[row, 5:].equal(masked[image].bfloat16())
    assert unet_sample(latents, {}, torch) is latents and CHANNELS_BESIDE in tensors
