"""Several runs at once, in one folder and in folders of their own."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from common.declared import LATENTS
from common.files import artifacts, picture_files
from common.files.stage_table import LATENTS_FILE
from tests.conftest import RUN_ALL, Run

STEPS = ("--num_inference_steps", "2")


def start(run_dir: Path, seed: int, *flags: str) -> "subprocess.Popen[str]":
    """Start all stages in the background."""
    command = [sys.executable, str(RUN_ALL), "--output_dir", str(run_dir), "--seed", str(seed)]
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    return subprocess.Popen(
        [*command, *STEPS, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


@pytest.mark.slow
def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    """One of them ends at once, or waits; what is there at the end is of one run alone."""
    run_dir = tmp_path / "run"
    both = [start(run_dir, seed, "--to_stage", "1") for seed in (1, 2)]
    said = [process.communicate(timeout=300)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 5], said
    assert f"{run_dir} is in use by run_all.py" in "".join(said)

    waiting = [start(run_dir, seed, "--wait") for seed in (3, 4)]
    said = [process.communicate(timeout=300)[1] for process in waiting]
    assert [process.returncode for process in waiting] == [0, 0], said
    header = artifacts.inspect(run_dir / LATENTS_FILE).header
    record = picture_files.read_picture_record(run_dir / "output_image.png")
    assert header is not None and record is not None
    seeds = header.recipe.settings_of(LATENTS)["seeds"]
    assert seeds in ([3], [4])
    assert [record["settings"]["seed"]] == seeds
    assert not list(run_dir.glob(".*"))


@pytest.mark.slow
@pytest.mark.long
def test_four_runs_in_four_folders(
    tmp_path: Path, run_all: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They share a cache that is empty at first, and disturb each other in nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    runs = [start(tmp_path / str(seed), seed) for seed in range(4)]
    for process in runs:
        _, said = process.communicate(timeout=600)
        assert process.returncode == 0, said
    flags = ("--seed", 0, "--num_images_per_prompt", 4, "--batch_size", 1)
    alone = tmp_path / "alone"
    assert run_all("--output_dir", alone, *STEPS, *flags).returncode == 0
    expected = load_file(alone / LATENTS_FILE)["latents"]
    for seed in range(4):
        latents = load_file(tmp_path / str(seed) / LATENTS_FILE)["latents"]
        assert latents[0].equal(expected[seed])
        with (
            Image.open(tmp_path / str(seed) / "output_image.png") as own,
            Image.open(alone / f"output_image_{seed:04d}.png") as same,
        ):
            assert np.array_equal(np.asarray(own), np.asarray(same))
