"""`compare_runs.py` beside numpy and the files themselves."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from common.files.stage_table import EMBEDDINGS_FILE, IMAGE_LATENTS_FILE, LATENTS_FILE
from tests.conftest import PROJECT_DIR, Run, run_script
from tests.printed import as_json
from tests.refusals import expect

COMPARE = PROJECT_DIR / "tools" / "compare_runs.py"


def test_a_changed_scheduler_is_named_as_the_first_difference(
    finished_run: Path, run_copy: Path, quick_stage: Run, tmp_path: Path
) -> None:
    for number, flags in ((2, ("--scheduler", "ddim")), (3, ())):
        result = quick_stage(number, "--output_dir", run_copy, *flags)
        assert result.returncode == 0, result.stderr
    content = as_json(COMPARE, finished_run, run_copy, "--output_dir", tmp_path / "differences")
    files = {file["name"]: file for file in content["files"]}
    assert files[EMBEDDINGS_FILE]["verdict"] == "identical"
    assert files[LATENTS_FILE]["verdict"] == "different"
    change = "scheduler EulerDiscreteScheduler → DDIMScheduler"
    assert files[LATENTS_FILE]["recipe"] == change
    assert content["first_difference"] == f"stage 2, {LATENTS_FILE}: {change}"
    a, b = (
        load_file(folder / LATENTS_FILE)["latents"].numpy() for folder in (finished_run, run_copy)
    )
    expected = np.linalg.norm(a - b) / np.linalg.norm(a)
    assert files[LATENTS_FILE]["tensors"]["latents"] == pytest.approx(expected, rel=1e-5)

    name = "output_image_0001.png"
    pictures = [
        np.asarray(Image.open(folder / name)).astype(float) for folder in (finished_run, run_copy)
    ]
    error = np.mean((pictures[0] - pictures[1]) ** 2)
    assert files[name]["psnr"] == pytest.approx(10 * np.log10(255**2 / error))
    drawn = np.asarray(
        Image.open(tmp_path / "differences" / "difference_output_image_0001_png.png")
    )
    assert np.array_equal(drawn[:, :128], pictures[0]) and drawn.shape == (128, 3 * 128, 3)
    largest = np.minimum(4 * np.abs(pictures[0] - pictures[1]), 255)
    assert np.array_equal(drawn[:, 256:], largest.astype(np.uint8))
    printed = run_script(COMPARE, finished_run, run_copy).stdout
    assert f"stage 1, {EMBEDDINGS_FILE}: identical" in printed and change in printed


def test_other_pictures_to_begin_with_are_named(tmp_path: Path, quick_stage: Run) -> None:
    runs = [tmp_path / "a", tmp_path / "b"]
    for value, run in zip((60, 180), runs, strict=True):
        picture = tmp_path / f"{value}.png"
        Image.fromarray(np.full((128, 128, 3), value, np.uint8)).save(picture)
        for number, flags in ((1, ("--image", picture)), (0, ())):
            result = quick_stage(number, "--output_dir", run, *flags)
            assert result.returncode == 0, result.stderr
    content = as_json(COMPARE, *runs)
    # Stage 1 comes first, which settles the settings.
    assert [file["stage"] for file in content["files"]] == [1, 0]
    assert content["first_difference"].startswith(f"stage 0, {IMAGE_LATENTS_FILE}: pictures ")
    tensors = content["files"][1]["tensors"]
    assert tensors["pictures"] == pytest.approx(2.0)
    means = [load_file(run / IMAGE_LATENTS_FILE)["image_latents_mean"] for run in runs]
    expected = float((means[0] - means[1]).norm() / means[0].norm())
    assert tensors["image_latents_mean"] == pytest.approx(expected, rel=1e-5)


def test_equal_runs_and_a_flipped_byte(finished_run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(finished_run, tmp_path / "other"))
    content = as_json(COMPARE, finished_run, other)
    assert content["first_difference"] is None and content["settings"] == {}
    for name in (EMBEDDINGS_FILE, LATENTS_FILE):
        damaged = bytearray((other / name).read_bytes())
        damaged[-7] ^= 0x10
        (other / name).write_bytes(damaged)
        result = run_script(COMPARE, finished_run, other)
        assert result.returncode == 3
        assert f"{other / name} is damaged" in result.stderr
        assert f"{name}: damaged" in result.stdout
        (other / name).write_bytes((finished_run / name).read_bytes())


def test_no_run_directory_is_one_sentence(tmp_path: Path) -> None:
    expect(run_script(COMPARE, *[tmp_path / "nothing"] * 2), 3, "nothing is no folder")
