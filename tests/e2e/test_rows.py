"""A changed list makes what is new or changed, and takes the rest from what is there."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from common.files.picture_files import read_picture_record
from common.files.report import read_report
from common.files.stage_table import EMBEDDINGS_FILE, LATENTS_FILE
from tests.conftest import Run

FLAGS = ("--num_inference_steps", 2, "--height", 64, "--width", 64)
FIRST = [
    {"prompt": f"a {colour} star", "negative_prompt": "dull", "seed": seed}
    for seed, colour in enumerate(("red", "green", "blue", "yellow", "white"), start=10)
]


def make(
    stage: Run, folder: Path, prompts: list[dict[str, Any]], begin: Path | None = None
) -> list[str]:
    """All stages of a list. Returns what each said."""
    path = folder.parent / f"{folder.name}.jsonl"
    begin = () if begin is None else ("--init_latents", begin, "--strength", 0.5)
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    said = []
    for number, flags in (
        (1, ("--prompts_file", path, *FLAGS, *begin)),
        (2, ("--batch_size", 2)),
        (3, ("--batch_size", 2)),
    ):
        result = stage(number, "--output_dir", folder, "--skip_fresh", *flags)
        assert result.returncode == 0, result.stderr
        said.append(result.stdout)
    return said


def row(folder: Path, file: str, place: int) -> dict[str, torch.Tensor]:
    return {name: tensor[place] for name, tensor in load_file(folder / file).items()}


def pixels(folder: Path, place: int) -> bytes:
    with Image.open(folder / f"output_image_{place:04d}.png") as image:
        return image.tobytes()


@pytest.mark.slow
def test_what_is_new_or_changed_is_made(tmp_path: Path, quick_stage: Run) -> None:
    run, fresh = tmp_path / "run", tmp_path / "fresh"
    make(quick_stage, run, FIRST)
    before = {file: load_file(run / file) for file in (EMBEDDINGS_FILE, LATENTS_FILE)}
    pictures = [pixels(run, place) for place in range(5)]
    new = {"prompt": "a large ring", "negative_prompt": "dull", "seed": 77}
    changed = FIRST[4] | {"negative_prompt": "blurry"}
    prompts = [FIRST[3], new, FIRST[0], changed, FIRST[1]]  # the third is gone
    for said in make(quick_stage, run, prompts):
        assert "2 of 5 to make: 1 new, 1 changed (negative_prompt)" in said
    for number in (2, 3):
        report = read_report(run, number)
        assert report is not None and report.rows_taken == 3
    assert [pixels(run, place) for place in (0, 2, 4)] == [pictures[old] for old in (3, 0, 1)]
    for file, tensors in before.items():
        for place, old in ((0, 3), (2, 0), (4, 1)):
            found = row(run, file, place)
            assert all(found[name].equal(tensor[old]) for name, tensor in tensors.items())
    assert "to make" not in "".join(make(quick_stage, fresh, prompts))
    for file in before:
        for place in range(5):
            expected = row(fresh, file, place)
            assert all(row(run, file, place)[k].equal(tensor) for k, tensor in expected.items())
    assert all(pixels(run, place) == pixels(fresh, place) for place in range(5))
    for name in ("output_grid.png", "output_image_0003.png"):
        records = [read_picture_record(folder / name) for folder in (run, fresh)]
        assert records[0] == records[1] is not None

    said = make(quick_stage, run, [changed, FIRST[3]])
    assert all("0 of 2 to make; others stand elsewhere now" in each for each in said)
    assert "programs" not in said[1] + said[2]
    assert pixels(run, 0) == pixels(fresh, 3) and not (run / "output_image_0002.png").exists()
    assert "removed 3 picture(s) that an earlier run made: output_image_0002.png" in said[2]
    assert row(run, LATENTS_FILE, 0)["latents"].equal(row(fresh, LATENTS_FILE, 3)["latents"])
    assert all("fresh" in each for each in make(quick_stage, run, [changed, FIRST[3]]))


def test_all_is_made_that_a_setting_of_the_run_shapes(tmp_path: Path, quick_stage: Run) -> None:
    run = tmp_path / "run"
    make(quick_stage, run, FIRST[:2])
    said = quick_stage(2, "--output_dir", run, "--skip_fresh", "--guidance_scale", 3).stdout
    assert "2 of 2 to make: 2 changed (guidance_scale)" in said
    again = quick_stage(2, "--output_dir", run, "--guidance_scale", 3).stdout
    assert "to make" not in again and "wrote" in again  # without --skip_fresh all is made anew


@pytest.mark.slow
def test_rows_that_begin_with_other_rows_count_by_these(tmp_path: Path, quick_stage: Run) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    make(quick_stage, first, FIRST[:2])
    make(quick_stage, second, FIRST[:2], first)
    kept = [pixels(second, place) for place in (0, 1)]
    new = {"prompt": "a large ring", "negative_prompt": "dull", "seed": 77}
    make(quick_stage, first, [new, *FIRST[:2]])
    for said in make(quick_stage, second, [new, *FIRST[:2]], first):
        assert "1 of 3 to make: 1 new" in said
    assert [pixels(second, place) for place in (1, 2)] == kept


def test_images_that_are_asked_for_are_made_anew_and_no_others(
    tmp_path: Path, quick_stage: Run
) -> None:
    run = tmp_path / "run"
    make(quick_stage, run, FIRST)
    before = {path.name: path.stat().st_ino for path in run.glob("output_image_*")}
    data = load_file(run / LATENTS_FILE)["latents"]
    for number in (1, 2, 3):
        flags = ("--output_dir", run, "--only", "3,1-2", "--batch_size", 2)
        prompts = ("--prompts_file", run.with_suffix(".jsonl"), *FLAGS)[: 99 if number == 1 else 0]
        own = flags[:4] if number == 1 else flags
        result = quick_stage(number, *own, *prompts)
        assert result.returncode == 0, result.stderr
        assert "3 of 5 to make: 3 asked for" in result.stdout
        report = read_report(run, number)
        assert report is not None and report.rows_taken == 2
    after = {path.name: path.stat().st_ino for path in run.glob("output_image_*")}
    changed = [name for name in before if after[name] != before[name]]
    assert sorted(changed) == [f"output_image_000{image}.png" for image in (1, 2, 3)]
    assert load_file(run / LATENTS_FILE)["latents"].equal(data)
    result = quick_stage(2, "--output_dir", run, "--only", "5", "--skip_fresh")
    assert result.returncode == 2 and "--only 5: the run has images 0 to 4" in result.stderr
