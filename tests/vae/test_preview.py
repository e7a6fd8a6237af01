"""Previews of latents against the pictures that the VAE makes of them."""

from pathlib import Path

import numpy as np
import pytest
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.numpy import load_file

from common.files.stage_table import LATENTS_FILE
from common.vae.preview import PICTURES, PreviewFit, draw_pictures, preview_of
from tests.conftest import DEMO


@pytest.fixture(scope="module")
def weights() -> np.ndarray:
    fit = PreviewFit(AutoencoderKL.from_pretrained(DEMO / "vae"), 8)
    for _ in range(PICTURES):
        assert fit.advance() is None
    found = fit.advance()
    assert found is not None
    return found


def test_previews_are_like_the_pictures(finished_run: Path, weights: np.ndarray) -> None:
    """The last step's correlate with the pictures, shrunk, by more than 0.7, of four steps."""
    latents = load_file(finished_run / LATENTS_FILE)["latents"]
    for index, each in enumerate(latents):
        shown = preview_of(each, weights)
        with Image.open(finished_run / f"output_image_{index:04d}.png") as picture:
            small = picture.convert("RGB").resize(shown.shape[1::-1], Image.Resampling.BOX)
        assert shown.shape == (*each.shape[1:], 3) and shown.dtype == np.uint8
        assert np.corrcoef(shown.ravel(), np.asarray(small).ravel())[0, 1] > 0.7


def test_infinities_are_colours(weights: np.ndarray) -> None:
    latents = np.full((4, 3, 2), np.inf, np.float32)
    latents[1] = np.nan
    with np.errstate(invalid="ignore"):
        assert preview_of(latents, weights).shape == (3, 2, 3)


def test_drawn_pictures_are_the_same_each_time_and_have_all_colours() -> None:
    first, again = ([*draw_pictures(PICTURES, 32)] for _ in range(2))
    np.testing.assert_array_equal(first, again)
    spread = np.stack(first).reshape(-1, 3)
    assert spread.min(0).max() == 0 and spread.max(0).min() == 1
    assert np.linalg.cond(np.cov(spread.T)) < 3  # no channel says what another one says
