"""Latents and pictures equal those of diffusers' own pipeline on the demo checkpoint.

Tolerances are the project's contract: 1e-4 relative for latents in float32, 2 of 255 for a pixel.
"""

import itertools
from typing import Any

import numpy as np
import pytest

from tests.conftest import DEMO, LONG
from tests.in_process import (
    Ours,
    load_pipeline,
    make_config,
    pixel_difference,
    relative_difference,
    run_diffusers,
    run_ours,
    run_pipeline,
)

SCHEDULERS = ("euler", "ddim")
GUIDANCE = (1.0, 5.0, 7.5)
BATCHES = (1, 3)
WIDTHS = (128, 192)
NEGATIVES = ("blurry, low quality", "", None)
# Of 255, the mean over a picture; measured: 0.4 to 0.9 in 20 steps.
BFLOAT16_DISTANCE = 2.0
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


@pytest.fixture(scope="module")
def both() -> tuple[Any, Ours]:
    return load_pipeline(DEMO), Ours(DEMO)


@pytest.mark.parametrize(
    ("scheduler", "guidance", "batch", "width", "negative"),
    [
        *SELECTED[:3],
        *(pytest.param(*combination, marks=pytest.mark.slow) for combination in SELECTED[3:5]),
        *(
            pytest.param(*combination, marks=LONG)
            for combination in EVERYTHING
            if combination not in SELECTED[:5]
        ),
    ],
)
def test_latents_and_pictures_equal_diffusers(
    both: tuple[Any, Ours],
    scheduler: str,
    guidance: float,
    batch: int,
    width: int,
    negative: str | None,
) -> None:
    config = make_config(
        DEMO,
        scheduler=scheduler,
        guidance_scale=guidance,
        batch=batch,
        width=width,
        negative_prompt=negative,
    )
    latents = both[1].denoise(config)
    pictures = both[1].decode(latents)
    expected_latents, expected_pictures = run_pipeline(both[0], config)
    assert latents.shape == expected_latents.shape
    assert relative_difference(latents, expected_latents) < 1e-4
    assert pixel_difference(pictures, expected_pictures) <= 2


@pytest.mark.parametrize("scheduler", ["euler_a", "heun", "dpmpp_2m_karras", "unipc", "pndm"])
@pytest.mark.slow
@pytest.mark.long
def test_other_schedulers_equal_diffusers(both: tuple[Any, Ours], scheduler: str) -> None:
    pipeline, ours = both
    config = make_config(DEMO, scheduler=scheduler, batch=2, num_inference_steps=8)
    latents = ours.denoise(config)
    expected_latents, expected_pictures = run_pipeline(pipeline, config)
    assert relative_difference(latents, expected_latents) < 1e-4
    assert pixel_difference(ours.decode(latents), expected_pictures) <= 2


@pytest.mark.slow
def test_bfloat16_stays_near_float32(both: tuple[Any, Ours]) -> None:
    config = make_config(DEMO, batch=3, num_inference_steps=20)
    _, expected = run_pipeline(both[0], config)
    ours = Ours(DEMO, dtype="bfloat16")
    pictures = ours.decode(ours.denoise(config))
    distance = np.abs(pictures.astype(float) - expected).mean(axis=(1, 2, 3))
    print("mean distance of bfloat16 pictures:", distance.round(2))
    assert distance.max() < BFLOAT16_DISTANCE


def test_the_default_scheduler_is_the_checkpoints_own() -> None:
    config = make_config(DEMO, num_inference_steps=3)
    latents, _ = run_ours(config)
    expected, _ = run_diffusers(config)
    assert relative_difference(latents, expected) < 1e-4
