"""Sweeps: which stages run where, and what a failing cell leaves."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from common.errors import BadInputFileError, BadSettingError
from common.runs.sweep import CellRun, parse_sweep, read_sweep, run_sweep
from common.stopping import STOP_SIGNALS
from tests.conftest import RUN_ALL, Run


def ran(tmp_path: Path, text: str, failing: str = "") -> tuple[list[tuple[int, str]], int]:
    """Stage and folder of each stage that ran, and the exit code."""
    runs: list[tuple[int, str]] = []

    def run(needed: CellRun) -> tuple[int, str]:
        folder = needed.folder.relative_to(tmp_path).as_posix()
        runs.append((needed.stage.number, folder))
        fails = bool(failing) and failing in folder
        return (4, "not finite") if fails else (0, "")

    code = run_sweep(tmp_path, parse_sweep(text, {}), run, lambda _: None)
    return runs, code


def test_each_stage_runs_as_often_as_its_output_differs(tmp_path: Path) -> None:
    runs, code = ran(tmp_path, "scheduler=euler,ddim num_inference_steps=10,20,30")
    assert code == 0
    cells = [
        f"sweep/scheduler={scheduler},num_inference_steps={steps}"
        for scheduler in ("euler", "ddim")
        for steps in (10, 20, 30)
    ]
    assert runs == [(1, "."), *((stage, cell) for cell in cells for stage in (2, 3))]

    runs, _ = ran(tmp_path, "vae_dtype=float32,bfloat16")
    assert [stage for stage, _ in runs] == [1, 2, 3, 3]
    runs, _ = ran(tmp_path, "prompt='a red star, large'|'a blue ring' seed=1,2")
    assert [stage for stage, _ in runs] == [1, 2, 3, 2, 3, 1, 2, 3, 2, 3]
    runs, _ = ran(tmp_path, "model_id=a,b")
    assert [stage for stage, _ in runs] == [1, 2, 3, 1, 2, 3]


@pytest.mark.slow
def test_cells_of_a_picture_are_pasted_into_it(tmp_path: Path, run_all: Run) -> None:
    """Pictures are encoded once, and each cell's stage 3 finds what it pastes into."""
    pixels = np.random.default_rng(2).integers(0, 256, (128, 128, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    mask = np.zeros((128, 128), np.uint8)
    mask[:, 64:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    flags = ("--image", tmp_path / "picture.png", "--mask_image", tmp_path / "mask.png")
    result = run_all(
        *("--output_dir", tmp_path / "run", *flags, "--keep_unmasked"),
        *("--num_inference_steps", 4, "--sweep", "strength=0.3,0.9"),
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("stage 0: encode") == 1
    made = []
    for strength in (0.3, 0.9):
        folder = tmp_path / "run" / "sweep" / f"strength={strength}"
        with Image.open(folder / "output_image.png") as picture:
            made.append(np.asarray(picture))
        np.testing.assert_array_equal(made[-1][:, :64], pixels[:, :64])
    assert (made[0] != made[1]).any()


def test_a_failing_cell_does_not_stop_the_others(tmp_path: Path) -> None:
    runs, code = ran(tmp_path, "scheduler=euler,bad,ddim", failing="bad")
    assert code == 4
    assert [stage for stage, _ in runs] == [1, 2, 3, 2, 2, 3]
    sweep = read_sweep(tmp_path)
    assert sweep is not None
    assert [(cell.exit_code, cell.error) for cell in sweep.cells] == [
        *((0, ""), (4, "not finite"), (0, ""))
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "names no flag"),
        ("scheduler", "FLAG=VALUE"),
        ("scheduler=", "FLAG=VALUE"),
        ("scheduler=euler,,ddim", "FLAG=VALUE"),
        ("shape=1,2", "shape is no flag"),
        ("output_dir=a,b", "output_dir is no flag"),
        ("seed=1,2 seed=3", "seed is given twice"),
        ("seed=1,1", "same value twice"),
        ("prompt='a", "cannot be read"),
    ],
)
def test_what_cannot_be_swept(text: str, said: str) -> None:
    with pytest.raises(BadSettingError, match=said):
        parse_sweep(text, {})
    with pytest.raises(BadSettingError, match="scheduler is given twice"):
        parse_sweep("--scheduler=euler,ddim", {"scheduler": "euler"})


def test_folders_are_told_apart_and_stay_below_the_run(tmp_path: Path) -> None:
    sweep = parse_sweep("prompt=../x,.._x,a/b", {})
    folders = [cell.folder for cell in sweep.cells]
    assert len(set(folders)) == 3
    assert all(folder.count("/") == 1 for folder in folders)
    (tmp_path / "sweep.json").write_text(
        sweep.model_dump_json().replace(json.dumps(folders[0])[1:-1], "../elsewhere")
    )
    with pytest.raises(BadInputFileError, match="elsewhere"):
        read_sweep(tmp_path)
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(BadInputFileError, match="damaged"):
        read_sweep(tmp_path)


@pytest.mark.slow
@pytest.mark.long
def test_six_cells_run_stage_1_once(run_all: Run, tmp_path: Path) -> None:
    result = run_all(
        *("--output_dir", tmp_path, "--prompt", "a small green ring"),
        *("--sweep", "scheduler=euler,edm_euler num_inference_steps=1,2,3"),
    )
    assert result.returncode == 2  # of diffusers' refusal of edm_euler for this checkpoint
    assert result.stdout.count("stage 1: encode") == 1
    assert result.stdout.count("stage 2: denoise") == 6
    assert result.stdout.count("stage 3: decode") == 3
    assert "sweep: 3 of 6 cells done" in result.stdout
    assert result.stderr.count("diffusers refuses EDMEulerScheduler") == 3
    page = (tmp_path / "report.html").read_text()
    for label in ("scheduler", "num_inference_steps", "euler", "edm_euler"):
        assert f">{label}</th>" in page
    assert page.count("failed: diffusers refuses EDMEulerScheduler") >= 3
    again = run_all(
        *("--output_dir", tmp_path, "--prompt", "a small green ring"),
        *("--sweep", "scheduler=euler num_inference_steps=1,2,3"),
    )
    assert again.returncode == 0 and again.stdout.count("fresh") == 1 + 3 + 3


@pytest.mark.slow
@pytest.mark.long
def test_a_sweep_that_is_stopped_leaves_no_process_and_goes_on(
    run_all: Run, tmp_path: Path
) -> None:
    flags = ("--output_dir", tmp_path, "--height", 64, "--width", 64, "--num_images_per_prompt", 3)
    flags += ("--batch_size", 1, "--sweep", "num_inference_steps=60,61")
    command = [sys.executable, str(RUN_ALL), *map(str, flags)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until = time.monotonic() + 120
    while not [*tmp_path.glob("sweep/*/stage2_progress/*")]:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    children = psutil.Process(process.pid).children()
    assert len(children) == 2
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == STOP_SIGNALS[signal.SIGINT][1], said
    assert not any(child.is_running() for child in children)
    assert not (tmp_path / ".jobs").exists()
    again = run_all(*flags)
    assert again.returncode == 0, again.stderr
    assert "goes on after" in again.stdout and "2 of 2 cells done" in again.stdout
