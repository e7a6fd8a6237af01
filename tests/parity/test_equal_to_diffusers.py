"""Latents and pictures equal those of diffusers' own pipeline on the demo checkpoint.

Tolerances are the project's contract: 1e-4 relative for latents in float32, 2 of 255 for a pixel.
"""

import itertools

import pytest

from tests.conftest import DEMO
from tests.in_process import (
    make_config,
    pixel_difference,
    relative_difference,
    run_diffusers,
    run_ours,
)

SCHEDULERS = ("euler", "ddim")
GUIDANCE = (1.0, 5.0, 7.5)
BATCHES = (1, 3)
WIDTHS = (128, 192)
NEGATIVES = ("blurry, low quality", "", None)
EVERYTHING = list(itertools.product(SCHEDULERS, GUIDANCE, BATCHES, WIDTHS, NEGATIVES))
# A few of them that together pair every value with every other kind of value at least once.
SELECTED = [
    ("euler", 7.5, 1, 128, NEGATIVES[0]),
    ("ddim", 5.0, 3, 192, NEGATIVES[0]),
    ("euler", 5.0, 1, 192, ""),
    ("ddim", 7.5, 3, 128, ""),
    ("euler", 7.5, 3, 192, None),
    ("ddim", 1.0, 1, 128, None),
    ("euler", 1.0, 3, 192, NEGATIVES[0]),
    ("ddim", 5.0, 1, 128, None),
]


def check(scheduler: str, guidance: float, batch: int, width: int, negative: str | None) -> None:
    config = make_config(
        DEMO,
        scheduler=scheduler,
        guidance_scale=guidance,
        batch=batch,
        width=width,
        negative_prompt=negative,
    )
    latents, pictures = run_ours(config)
    expected_latents, expected_pictures = run_diffusers(config)
    assert latents.shape == expected_latents.shape
    assert relative_difference(latents, expected_latents) < 1e-4
    assert pixel_difference(pictures, expected_pictures) <= 2


@pytest.mark.parametrize(("scheduler", "guidance", "batch", "width", "negative"), SELECTED)
def test_latents_and_pictures_equal_diffusers(
    scheduler: str, guidance: float, batch: int, width: int, negative: str | None
) -> None:
    check(scheduler, guidance, batch, width, negative)


@pytest.mark.slow
@pytest.mark.parametrize(("scheduler", "guidance", "batch", "width", "negative"), EVERYTHING)
def test_every_combination_equals_diffusers(
    scheduler: str, guidance: float, batch: int, width: int, negative: str | None
) -> None:
    check(scheduler, guidance, batch, width, negative)


def test_the_default_scheduler_is_the_checkpoints_own() -> None:
    config = make_config(DEMO, num_inference_steps=3)
    latents, _ = run_ours(config)
    expected, _ = run_diffusers(config)
    assert relative_difference(latents, expected) < 1e-4
