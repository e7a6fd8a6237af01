"""`--tile` gives the pictures of diffusers' own tiled decoding, on one device and on several."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor

from tests.conftest import DEMO, LONG, Run
from tests.in_process import Ours, pixel_difference

# The demo VAE's tiles are of 16 × 16 latents, one every 12; those at the ends are smaller.
SIZES = [(20, 32), (16, 28), (36, 16)]


def by_diffusers(latents: np.ndarray, *, tile: bool) -> np.ndarray:
    vae = AutoencoderKL.from_pretrained(DEMO / "vae", torch_dtype=torch.float32)
    if tile:
        vae.enable_tiling()
    with torch.no_grad():
        images = vae.decode(torch.from_numpy(latents) / vae.config.scaling_factor).sample
    pictures = VaeImageProcessor().postprocess(images, output_type="np")
    return (pictures * 255).round().astype(np.uint8)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "options",
    [
        {"mesh": "single"},
        pytest.param({"mesh": "data=2,rows=4"}, marks=LONG),
        {"backend": "torch"},
    ],
    ids=str,
)
def test_tiles_equal_diffusers(size: tuple[int, int], options: dict[str, str]) -> None:
    latents = np.random.default_rng(1).normal(size=(2, 4, *size)).astype(np.float32)
    found = Ours(DEMO, settings={"tile": True}, **options).decode(latents)
    expected = by_diffusers(latents, tile=True)
    assert pixel_difference(found, expected) <= 1
    # Tiles are seen: this is not the picture that is decoded whole.
    assert pixel_difference(expected, by_diffusers(latents, tile=False)) > 1


def test_pictures_no_larger_than_a_tile_are_decoded_whole() -> None:
    latents = np.random.default_rng(1).normal(size=(1, 4, 16, 8)).astype(np.float32)
    ours = Ours(DEMO, settings={"tile": True})
    assert pixel_difference(ours.decode(latents), by_diffusers(latents, tile=False)) <= 1
    assert ours.programs.compiled + ours.programs.from_cache == 1


@pytest.mark.parametrize(
    ("size", "stale"), [pytest.param(128, False, marks=pytest.mark.slow), (160, True)]
)
def test_tiling_is_a_setting_of_large_pictures(
    size: int, stale: bool, quick_stage: Run, tmp_path: Path
) -> None:
    """Pictures that fit into a tile are the same with it, so they stay fresh."""
    for number, flags in ((1, ("--height", 64, "--width", size)), (2, ()), (3, ())):
        steps = () if number > 2 else ("--num_inference_steps", 1)
        result = quick_stage(number, "--output_dir", tmp_path, *flags, *steps)
        assert result.returncode == 0, result.stderr
    result = quick_stage(3, "--output_dir", tmp_path, "--tile", "--skip_fresh")
    assert result.returncode == 0, result.stderr
    assert ("because tile false → true" in result.stdout) == stale
    assert ("stage 3: fresh" in result.stdout) != stale
