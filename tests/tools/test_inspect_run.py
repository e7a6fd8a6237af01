"""`inspect_run.py` beside numpy and the files themselves."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from common.files import artifacts
from common.files.picture_files import read_pixels
from common.files.row_reader import RowReader
from common.files.stage_table import EMBEDDINGS_FILE, LATENTS_FILE
from tests.conftest import PROJECT_DIR, Run, file_contents, run_script
from tests.printed import as_json, states
from tests.refusals import expect
from tests.tiny_checkpoints import save_demo_lora

INSPECT = PROJECT_DIR / "tools" / "inspect_run.py"


def test_a_run_is_shown_as_it_lies_on_the_disk(finished_run: Path) -> None:
    before = file_contents(finished_run)
    content = as_json(INSPECT, finished_run)
    assert file_contents(finished_run) == before
    assert set(states(content).values()) == {("fresh", "")}
    files = {file["name"]: file for file in content["files"]}
    assert list(files) == [
        *(EMBEDDINGS_FILE, LATENTS_FILE),
        *("output_grid.png", "output_image_0000.png", "output_image_0001.png"),
    ]
    for name in (EMBEDDINGS_FILE, LATENTS_FILE):
        tensors = load_file(finished_run / name)
        shown = {tensor["name"]: tensor for tensor in files[name]["tensors"]}
        assert shown.keys() == tensors.keys()
        for key, tensor in tensors.items():
            values = tensor.numpy().astype(np.float64)
            assert shown[key]["shape"] == list(values.shape)
            assert shown[key]["dtype"] == "F32" and shown[key]["finite"]
            for statistic in ("min", "mean", "max", "std"):
                expected = getattr(values, statistic)()
                assert shown[key][statistic] == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert files[LATENTS_FILE]["made_from"] == {
        EMBEDDINGS_FILE: files[EMBEDDINGS_FILE]["data_sha256"]
    }
    latents = load_file(finished_run / LATENTS_FILE)["latents"]
    for image in (0, 1):  # a picture is made from its own row
        row = latents[image : image + 1].contiguous()
        assert files[f"output_image_000{image}.png"]["made_from"] == {
            LATENTS_FILE: artifacts.hash_tensors({"latents": row})
        }
    printed = run_script(INSPECT, finished_run).stdout
    assert f"{LATENTS_FILE}: fresh" in printed and "2×4×16×16" in printed
    report = json.loads((finished_run / "stage2_report.json").read_text())
    latents = printed.split(f"\n{LATENTS_FILE}: ")[1].split("\noutput_")[0]
    assert f" by {report['backend']}, data " in latents


def test_missing_damaged_and_foreign_files_are_shown(run_copy: Path) -> None:
    content = bytearray((run_copy / LATENTS_FILE).read_bytes())
    content[-1] ^= 1
    (run_copy / LATENTS_FILE).write_bytes(content)
    (run_copy / EMBEDDINGS_FILE).unlink()
    (run_copy / "output_grid.png").write_bytes(b"no picture")
    result = run_script(INSPECT, run_copy)
    assert result.returncode == 3
    assert LATENTS_FILE in result.stderr and "output_grid.png" in result.stderr
    assert f"{EMBEDDINGS_FILE}: missing" in result.stdout
    assert f"{LATENTS_FILE}: damaged" in result.stdout and "checksum" in result.stdout

    save_file({"latents": torch.tensor([[1.0, float("nan")]])}, run_copy / LATENTS_FILE)
    (run_copy / "output_grid.png").unlink()
    content = as_json(INSPECT, run_copy)
    foreign = next(file for file in content["files"] if file["name"] == LATENTS_FILE)
    assert (foreign["state"], foreign["why"]) == ("unknown", "it has no header of ours")
    assert foreign["tensors"][0]["finite"] is False and foreign["tensors"][0]["max"] == 1.0


def test_no_run_directory_is_one_sentence(tmp_path: Path) -> None:
    expect(run_script(INSPECT, tmp_path / "nothing"), 3, "nothing is no folder")


@pytest.mark.slow
@pytest.mark.long
def test_an_image_is_made_alone_by_the_commands_that_are_shown(
    tmp_path: Path, stage: Run, quick_stage: Run
) -> None:
    """Of a run with all that a list may have; bits are those of the group that it was in."""
    run, again = tmp_path / "run", tmp_path / "again"
    lines = [
        {"prompt": "a {red|blue} star", "id": "star", "negative_prompt": None},
        {
            "prompt": "a green ring",
            "seed": 9,
            "prompt_2": "round",
            "negative_prompt": "it's “dull”",
            "height": 96,
            "loras": [f"{save_demo_lora(tmp_path / 'own lora.safetensors', size=0.1)}:0.5"],
        },
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    settings = ("--num_inference_steps", 3, "--scheduler", "euler_a", "--height", 64)
    named = ("--name_template", "{index:02d}_{seed}", "--prompt_syntax", "dynamic")
    many = ("--prompts_file", tmp_path / "prompts.jsonl", "--num_images_per_prompt", 2)
    options = ("--batch_size", 4, "--output_dir", run)
    for number, own in (
        (1, (*many, *settings, *named, "--output_dir", run)),
        (2, ("--seed_offset", 3, "--guidance_scale", 4, *options)),
        (3, ("--image_format", "webp", *options)),
    ):
        result = quick_stage(number, *own)
        assert result.returncode == 0, result.stderr
    content = as_json(INSPECT, run, "--image", 5)
    assert content["settings"]["prompt"] == "a green ring" and content["settings"]["seed"] == 13
    assert content["overrides"]["image_format"] == ["png", "webp"]
    # The group is as large as its size has images for.
    assert content["made_by"]["2"]["batch_size"] == 2 and not content["notes"]
    for command, number in zip(content["commands"], (1, 2, 3), strict=True):
        arguments = [part for part in shlex.split(command)[2:] if "output_dir" not in part]
        result = stage(number, *arguments, "--output_dir", again)
        assert result.returncode == 0, result.stderr
    rows = [
        RowReader(artifacts.inspect(folder / LATENTS_FILE), lambda text: pytest.fail(text))
        for folder in (run, again)
    ]
    assert rows[0].sizes == [[0, 1, 2, 3], [4, 5]] and rows[1].sizes == [[0]]
    assert rows[1].read([0])["latents"].equal(rows[0].read([5])["latents"])
    picture = Path(content["file"])
    assert picture.name == "05_13.webp"
    assert np.array_equal(read_pixels(again / "output_image.webp"), read_pixels(picture))
    shown = run_script(INSPECT, picture).stdout
    assert "alone again" in shown and all(command in shown for command in content["commands"])


def test_images_that_cannot_be_shown(run_copy: Path, tmp_path: Path) -> None:
    expect(run_script(INSPECT, run_copy, "--image", 2), 2, "has images 0 to 1")
    expect(run_script(INSPECT, tmp_path, "--image", 0), 3, "has no list of its pictures")
    expect(run_script(INSPECT, run_copy / LATENTS_FILE), 3, "damaged or no picture of ours")
    shown = run_script(INSPECT, run_copy / "output_grid.png").stdout
    assert "how it is made again is not known" in shown and "alone again" not in shown
