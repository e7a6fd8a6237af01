"""Stage 0 as a script: what it writes, when it is fresh, what it refuses."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from safetensors.torch import load_file

from common.files.report import read_report
from common.files.stage_table import IMAGE_LATENTS_FILE, LATENTS_FILE
from tests.conftest import DEMO, Run, file_contents
from tests.printed import ran
from tests.refusals import expect, refuse_flag, refuse_flags

SMALL = ("--num_inference_steps", 4)


@pytest.fixture
def begun(tmp_path: Path, finished_run: Path, quick_stage: Run) -> Path:
    """A run with settings and embeddings, that begins with a picture of 128×128."""
    picture = tmp_path / "star.png"
    shutil.copy(finished_run / "output_image_0000.png", picture)
    mask = np.zeros((128, 128), np.uint8)
    mask[:, 64:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    run_dir = tmp_path / "run"
    result = quick_stage(1, "--output_dir", run_dir, "--image", picture, *SMALL)
    assert result.returncode == 0, result.stderr
    return run_dir


def test_it_writes_diffusers_posterior(begun: Path, quick_stage: Run) -> None:
    result = quick_stage(0, "--output_dir", begun)
    assert result.returncode == 0, result.stderr
    assert "stage 0: encode 1 picture(s), 128×128" in result.stdout
    found = load_file(begun / IMAGE_LATENTS_FILE)
    assert sorted(found) == ["image_latents_mean", "image_latents_std", "pictures"]
    with Image.open(begun.parent / "star.png") as opened:
        picture = opened.convert("RGB")
    np.testing.assert_array_equal(found["pictures"][0].numpy(), np.asarray(picture))
    vae = AutoencoderKL.from_pretrained(DEMO / "vae")
    with torch.no_grad():
        expected = vae.encode(VaeImageProcessor().preprocess(picture)).latent_dist
    assert torch.allclose(found["image_latents_mean"], expected.mean, atol=1e-5)
    assert torch.allclose(found["image_latents_std"], expected.std, atol=1e-5)
    report = read_report(begun, 0)
    assert report is not None and report.shapes["pictures"] == [1, 128, 128, 3]


def test_pixels_make_it_fresh_not_names(begun: Path, quick_stage: Run) -> None:
    def encode() -> str:
        result = quick_stage(0, "--output_dir", begun, "--skip_fresh")
        assert result.returncode == 0, result.stderr
        return str(result.stdout)

    star, copy = begun.parent / "star.png", begun.parent / "copy.png"
    assert "because stage0_latents.safetensors is not there" in encode()
    assert "fresh" in encode()
    shutil.copy(star, copy)
    assert quick_stage(1, "--output_dir", begun, "--image", copy, *SMALL).returncode == 0
    assert "fresh" in encode()
    # Stage 2 takes them too: the pixels are the run's.
    assert quick_stage(2, "--output_dir", begun).returncode == 0
    with Image.open(star) as opened:
        opened.convert("RGB").rotate(90).save(copy)
    assert "because pictures" in encode()


def test_stage_2_refuses_latents_of_other_pictures(begun: Path, quick_stage: Run) -> None:
    result = quick_stage(2, "--output_dir", begun)
    expect(result, 3, IMAGE_LATENTS_FILE, "stage0_image_encoder.py")
    assert quick_stage(0, "--output_dir", begun).returncode == 0
    other = begun.parent / "other.png"
    Image.new("RGB", (128, 128), "green").save(other)
    assert quick_stage(1, "--output_dir", begun, "--image", other, *SMALL).returncode == 0
    before = file_contents(begun)
    expect(quick_stage(2, "--output_dir", begun), 3, "other images", "stage0_image_encoder.py")
    assert file_contents(begun) == before


def test_a_run_without_pictures_has_no_stage_0(run_copy: Path, quick_stage: Run) -> None:
    before = file_contents(run_copy)
    result = quick_stage(0, "--output_dir", run_copy)
    expect(result, 2, "is a run without pictures", "--image", "stage1_text_encoder.py")
    assert file_contents(run_copy) == before


@pytest.mark.slow
def test_run_all_makes_only_what_changed(begun: Path, run_all: Run) -> None:
    """Strength is of the latents, what stays of the pictures, the mask of all but the prompts."""
    star, mask = begun.parent / "star.png", begun.parent / "mask.png"
    base = ("--output_dir", begun, "--image", star, *SMALL)
    assert ran(run_all(*base, "--strength", 0.6)) == [0, 2, 3]
    masked = (*base, "--strength", 0.8, "--mask_image", mask)
    assert ran(run_all(*masked)) == [0, 2, 3]
    assert ran(run_all(*masked, "--keep_unmasked")) == [3]
    with Image.open(star) as before, Image.open(begun / "output_image.png") as after:
        kept = np.asarray(before.convert("RGB"))[:, :64]
        np.testing.assert_array_equal(kept, np.asarray(after)[:, :64])
    # Without a picture again nothing of it is left in what is made.
    assert ran(run_all("--output_dir", begun, *SMALL)) == [2, 3]


@pytest.mark.slow
def test_a_crop_is_made_anew_and_pasted(begun: Path, run_all: Run) -> None:
    small = np.zeros((128, 128), np.uint8)
    small[40:60, 30:70] = 255
    mask = begun.parent / "small.png"
    Image.fromarray(small).save(mask)
    result = run_all(
        *("--output_dir", begun, "--image", begun.parent / "star.png", "--mask_image", mask),
        *("--padding_mask_crop", 8, *SMALL, "--height", 64, "--width", 64),
    )
    assert result.returncode == 0, result.stderr
    assert load_file(begun / LATENTS_FILE)["latents"].shape[2:] == (8, 8)
    with Image.open(begun.parent / "star.png") as before:
        expected = np.asarray(before.convert("RGB"))
    with Image.open(begun / "output_image.png") as after:
        found = np.asarray(after)
    np.testing.assert_array_equal(found[small == 0], expected[small == 0])
    assert (found[small > 0] != expected[small > 0]).any()


def test_a_value_out_of_bounds_names_its_flag_and_the_bound(run_dir: Path) -> None:
    refuse_flag(run_dir, 0, "batch_size", "0", "0: input should be greater than or equal to 1")
    refuse_flag(run_dir, 0, "resize_mode", "stretch", "'stretch': input should be 'default'")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dtype", "float32", "--vae_dtype", "float32"], ["--dtype", "--vae_dtype", "not both"]),
        (["--json", "x"], ["--json is for --topology"]),
        (["--topology", "v6e:1x1", "--wait"], ["--wait is for a run, and --topology only"]),
        (["--mesh", "cfg=3"], ["--mesh cfg=3", "1 or 2"]),
    ],
)
def test_flags_that_do_not_go_together(
    run_dir: Path, arguments: list[str], words: list[str]
) -> None:
    refuse_flags(run_dir, 0, arguments, words)
