"""Pictures that are picked are a run of their own, which computes nothing and is fresh."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from common.files import artifacts
from common.files.picture_files import read_pixels
from common.files.report import read_report
from common.files.stage_table import IMAGE_LATENTS_FILE, LATENTS_FILE
from tests.conftest import PROJECT_DIR, Run, run_script
from tests.printed import as_json, states
from tests.refusals import expect

PICK, INSPECT = (PROJECT_DIR / "tools" / f"{name}.py" for name in ("pick", "inspect_run"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, quick_stage: Run) -> Path:
    """Two prompts with two images each, one of them by its id; another seed in stage 2."""
    folder = tmp_path_factory.mktemp("pick") / "run"
    prompts = folder.with_suffix(".jsonl")
    lines = [{"prompt": "a red star", "id": "star"}, {"prompt": "a blue ring", "seed": 7}]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    flags = ("--height", 64, "--width", 64, "--num_inference_steps", 2)
    for number, own in (
        (1, (*flags, "--prompts_file", prompts, "--num_images_per_prompt", 2)),
        (2, ("--seed_offset", 5, "--batch_size", 2)),
        (3, ()),
    ):
        result = quick_stage(number, "--output_dir", folder, *own)
        assert result.returncode == 0, result.stderr
    return folder


def test_a_picked_run_is_fresh_and_nothing_is_computed(run: Path, tmp_path: Path) -> None:
    picked = tmp_path / "picked"
    result = run_script(PICK, run, "3,0-1", "--output_dir", picked)
    assert result.returncode == 0, result.stderr
    assert f"3 picture(s): {picked}" in result.stdout and "0 of 3 to make" in result.stdout
    assert {state for state, _ in states(as_json(INSPECT, picked)).values()} == {"fresh"}
    index = [json.loads(line) for line in (run / "images.jsonl").read_text().splitlines()]
    lines = [json.loads(line) for line in (picked / "images.jsonl").read_text().splitlines()]
    before, after = (load_file(folder / LATENTS_FILE)["latents"] for folder in (run, picked))
    for line, image in zip(lines, (3, 0, 1), strict=True):
        same = ("prompt", "seed", "fingerprint", "seconds")
        assert {name: line[name] for name in same} == {name: index[image][name] for name in same}
        assert after[line["index"]].equal(before[image])
        expected = read_pixels(run / index[image]["file"])
        assert (read_pixels(picked / line["file"]) == expected).all()
    assert lines[0]["seed"] == 7 + 1 + 5
    assert [line.get("id") for line in lines] == [None, "star_0", "star_1"]
    report = read_report(picked, 3)
    assert report is not None and report.rows_taken == 3
    assert not list(picked.glob(".*"))


def test_what_cannot_be_picked(run: Path, run_copy: Path, tmp_path: Path) -> None:
    expect(run_script(PICK, run, "4", "--output_dir", tmp_path / "a"), 2, "images 0 to 3")
    expect(
        run_script(PICK, run, "1", "--output_dir", run_copy), 2, "has files: choose a new folder"
    )
    expect(run_script(PICK, tmp_path, "1", "--output_dir", tmp_path / "a"), 3, "is missing")
    (run_copy / LATENTS_FILE).unlink()
    result = run_script(PICK, run_copy, "1", "--output_dir", tmp_path / "b")
    expect(result, 3, LATENTS_FILE, "is missing")
    assert not (tmp_path / "b" / "generation_config.json").exists()


def test_what_was_not_made_with_these_settings_is_not_picked(
    run_copy: Path, tmp_path: Path
) -> None:
    path = run_copy / "generation_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"guidance_scale": 3.0}))
    result = run_script(PICK, run_copy, "0", "--output_dir", tmp_path / "picked")
    expect(result, 3, LATENTS_FILE, "has not all of these images", "./run_all.sh --output_dir")


def test_a_run_that_begins_with_pictures(run_copy: Path, tmp_path: Path, quick_stage: Run) -> None:
    """Stage 0's file has pictures and masks as they are, of other dtypes than latents."""
    run, picked = tmp_path / "begun", tmp_path / "picked"
    pictures = [f"--image={run_copy / f'output_image_000{k}.png'}" for k in (0, 1)]
    flags = ("--num_inference_steps", 2, "--height", 64, "--width", 64)
    for number, own in ((1, (*pictures, *flags)), (0, ()), (2, ("--strength", 0.6)), (3, ())):
        result = quick_stage(number, "--output_dir", run, *own)
        assert result.returncode == 0, result.stderr
    result = run_script(PICK, run, "1", "--output_dir", picked)
    assert result.returncode == 0, result.stderr
    assert {state for state, _ in states(as_json(INSPECT, picked)).values()} == {"fresh"}
    before, after = (load_file(folder / IMAGE_LATENTS_FILE) for folder in (run, picked))
    assert before.keys() == after.keys()
    assert all(after[name][0].equal(tensor[1]) for name, tensor in before.items())
    headers = [artifacts.inspect(folder / IMAGE_LATENTS_FILE).header for folder in (run, picked)]
    assert headers[0] is not None and headers[1] is not None
    assert headers[0].provenance["made_by"] == headers[1].provenance["made_by"] != []
