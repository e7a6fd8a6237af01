"""What UNets for edits by instruction are shown beside the latents."""

import torch

from common.conditions.base import (
    CHANNELS_BESIDE,
    CONDITIONAL,
    PICTURE,
    UNCONDITIONAL,
    ImagesOfGroup,
)
from common.conditions.edited_picture import EditedPicture


def test_unets_of_eight_channels_have_it() -> None:
    assert EditedPicture.of(None, {"in_channels": 8, "out_channels": 4}) is not None
    assert EditedPicture.of(None, {"in_channels": 9, "out_channels": 4}) is None
    assert EditedPicture.of(None, {}) is None


def test_the_prediction_without_anything_is_shown_zeros() -> None:
    edited, embeddings = torch.rand(2, 4, 3, 5), {"prompt_embeds": torch.zeros(2, 1, 1)}
    images = ImagesOfGroup(embeddings=embeddings, dtype=torch.bfloat16, edited=edited)
    for prediction in (CONDITIONAL, PICTURE, UNCONDITIONAL):
        shown = EditedPicture().prepare(images, prediction)[CHANNELS_BESIDE]
        assert shown.dtype == torch.bfloat16
        expected = edited * 0 if prediction == UNCONDITIONAL else edited
        assert shown.equal(expected.bfloat16())
