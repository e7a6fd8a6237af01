"""What a run asks for: which prompt an image has, and how many predictions its guidance takes."""

import numpy as np
import pytest
import torch

from common.conditions.base import CONDITIONAL, UNCONDITIONAL
from tests.sampling.tiny_unet import make_job


def test_an_image_has_the_rows_of_its_prompt() -> None:
    job = make_job(prompts=3, images_per_prompt=2)
    chosen = np.array([4, 1, 2, 2])  # a group's last image may stand there twice
    images = job.images(chosen, torch.float32)
    assert images.count == 4
    for name, prediction in (
        ("prompt_embeds", CONDITIONAL),
        ("negative_prompt_embeds", UNCONDITIONAL),
    ):
        rows = images.of_prediction("prompt_embeds", prediction)
        for row, prompt in zip(rows, (2, 0, 1, 1), strict=True):
            assert row.equal(job.embeddings[name][prompt])


@pytest.mark.parametrize(("scale", "expected"), [(0.0, 1), (1.0, 1), (1.1, 2), (7.5, 2)])
def test_guidance_takes_two_predictions(scale: float, expected: int) -> None:
    assert len(make_job(scale=scale).guidance.most_predictions()) == expected
