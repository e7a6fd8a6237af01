"""Latents that a run begins with: found, fitting, and counted by their content."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.declared import LATENTS
from common.errors import BadInputFileError, BadSettingError
from common.files import artifacts
from common.files.rows import row_hashes
from common.files.stage_table import LATENTS_FILE
from common.models.checkpoint import Checkpoint
from common.runs.init_latents import find_init_latents
from tests.configs import make_config
from tests.conftest import DEMO, Run
from tests.refusals import refusal


def save(path: Path, *shape: int) -> Path:
    save_file({"latents": torch.zeros(shape)}, path)
    return path


def find(path: Path, run_dir: Path, **settings: object) -> artifacts.Artifact | None:
    config = make_config(DEMO, init_latents=str(path), **settings)
    return find_init_latents(config, Checkpoint(str(DEMO), DEMO), run_dir, verify=True)


def test_a_run_a_file_or_none(tmp_path: Path) -> None:
    file = save(tmp_path / LATENTS_FILE, 1, 4, 16, 16)
    for place in (tmp_path, file):
        found = find(place, tmp_path / "run")
        assert found is not None and found.path == file
    config = make_config(DEMO)
    assert find_init_latents(config, Checkpoint("", DEMO), tmp_path, verify=True) is None


def test_what_does_not_fit_is_one_sentence(tmp_path: Path) -> None:
    run_dir, file = tmp_path / "run", tmp_path / "latents.safetensors"
    with refusal(BadInputFileError, f"--init_latents {file} is not there: name a run directory"):
        find(file, run_dir)
    save(file, 1, 8, 16, 16)
    with refusal(BadInputFileError, str(file), "the VAE needs 4 channels", "choose another file"):
        find(file, run_dir)
    save(file, 1, 4, 16, 8)
    with refusal(BadSettingError, "of pictures of 64×128, the run's are 128×128", "--width 64"):
        find(file, run_dir)
    save(file, 3, 4, 16, 16)
    with refusal(BadSettingError, "has latents of 3 images, the run makes 2"):
        find(file, run_dir, batch=2)
    file.write_bytes(b"damaged")
    with refusal(BadInputFileError, f"{file} is damaged"):
        find(file, run_dir)
    run_dir.mkdir()
    own = save(run_dir / LATENTS_FILE, 1, 4, 16, 16)
    for place in (run_dir, own):
        with refusal(BadSettingError, f"--init_latents {place} is what this run writes"):
            find(place, run_dir)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"strength": 0.5}, "strength is for what a run begins with: give image or init_latents"),
        (
            {"denoising_start": 0.5},
            "denoising_start goes on from latents with noise in them: give init_latents",
        ),
        (
            {"init_latents": "a", "denoising_start": 0.5, "strength": 0.3},
            "denoising_start goes on without new noise",
        ),
        (
            {"init_latents": "a", "denoising_start": 0.5, "denoising_end": 0.4},
            "denoising_start 0.5 is not before denoising_end 0.4",
        ),
        ({"denoising_end": 1.0}, "less than 1"),
        ({"denoising_end": 0.0}, "greater than 0"),
        ({"denoising_end": True}, "not true or false"),
        ({"init_latents": "a", "strength": 1.5}, "less than or equal to 1"),
    ],
    ids=str,
)
def test_settings_that_do_not_go_together(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_config(DEMO, **settings)


def test_stage_2_begins_with_them_and_counts_them_by_content(
    run_copy: Path, tmp_path: Path, quick_stage: Run
) -> None:
    moved = Path(shutil.copytree(run_copy, tmp_path / "moved"))
    run_dir = tmp_path / "begun"

    def denoise(*flags: object) -> str:
        result = quick_stage(2, "--input_dir", run_copy, "--output_dir", run_dir, *flags)
        assert result.returncode == 0, result.stderr
        return str(result.stdout)

    assert "2 of 4 steps" in denoise("--init_latents", run_copy, "--strength", 0.5)
    begun = load_file(run_dir / LATENTS_FILE)["latents"]
    source = artifacts.inspect(run_copy / LATENTS_FILE)
    header = artifacts.inspect(run_dir / LATENTS_FILE).header
    assert header is not None
    own = header.recipe.settings_of(LATENTS)
    assert (own["init_latents"], own["strength"]) == (row_hashes(source), 0.5)

    same = ("--init_latents", moved, "--strength", 0.5, "--skip_fresh")
    assert "fresh" in denoise(*same)
    tensors = load_file(moved / LATENTS_FILE)
    save_file({"latents": tensors["latents"] + 1}, moved / LATENTS_FILE)
    assert "because init_latents" in denoise(*same)
    assert not load_file(run_dir / LATENTS_FILE)["latents"].equal(begun)
    assert "because" in denoise("--skip_fresh")  # from noise again


def test_one_for_all_images(run_copy: Path, tmp_path: Path, quick_stage: Run) -> None:
    """Each image's own seed draws its noise."""
    one = tmp_path / "one.safetensors"
    first = load_file(run_copy / LATENTS_FILE)["latents"][:1]
    save_file({"latents": first}, one)
    flags = ("--init_latents", one, "--strength", 0.5)
    result = quick_stage(2, "--input_dir", run_copy, "--output_dir", tmp_path / "run", *flags)
    assert result.returncode == 0, result.stderr
    made = load_file(tmp_path / "run" / LATENTS_FILE)["latents"]
    assert made.shape[0] == 2 and not made[0].equal(made[1])
