"""`inspect_run.py` and `compare_runs.py` beside numpy and the files themselves."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.conftest import PROJECT_DIR, Run, file_contents, run_script

INSPECT = PROJECT_DIR / "tools" / "inspect_run.py"
COMPARE = PROJECT_DIR / "tools" / "compare_runs.py"
EMBEDDINGS, LATENTS = "stage1_embeddings.safetensors", "stage2_latents.safetensors"


def as_json(script: Path, *arguments: object, code: int = 0) -> Any:
    result = run_script(script, *arguments, "--json")
    assert result.returncode == code, result.stderr
    return json.loads(result.stdout)


def states(content: Any) -> dict[str, tuple[str, str]]:
    return {file["name"]: (file["state"], file["why"]) for file in content["files"]}


def test_a_run_is_shown_as_it_lies_on_the_disk(finished_run: Path) -> None:
    before = file_contents(finished_run)
    content = as_json(INSPECT, finished_run)
    assert file_contents(finished_run) == before
    assert set(states(content).values()) == {("fresh", "")}
    files = {file["name"]: file for file in content["files"]}
    assert list(files) == [
        *(EMBEDDINGS, LATENTS, "output_grid.png", "output_image_0000.png", "output_image_0001.png")
    ]
    for name in (EMBEDDINGS, LATENTS):
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
    assert files[LATENTS]["made_from"] == {EMBEDDINGS: files[EMBEDDINGS]["data_sha256"]}
    assert files["output_image_0000.png"]["made_from"] == {LATENTS: files[LATENTS]["data_sha256"]}
    printed = run_script(INSPECT, finished_run).stdout
    assert f"{LATENTS}: fresh" in printed and "2×4×16×16" in printed
    report = json.loads((finished_run / "stage2_report.json").read_text())
    latents = printed.split(f"\n{LATENTS}: ")[1].split("\noutput_")[0]
    assert f" by {report['backend']}, data " in latents


def test_what_is_stale_says_why(run_copy: Path) -> None:
    path = run_copy / "generation_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"seed": 43}))
    found = states(as_json(INSPECT, run_copy))
    assert found[EMBEDDINGS] == ("fresh", "")
    assert found[LATENTS] == ("stale", "seeds [42, 43] → [43, 44]")
    assert found["output_image_0000.png"] == ("stale", f"{LATENTS} is stale")


def test_missing_damaged_and_foreign_files_are_shown(run_copy: Path) -> None:
    content = bytearray((run_copy / LATENTS).read_bytes())
    content[-1] ^= 1
    (run_copy / LATENTS).write_bytes(content)
    (run_copy / EMBEDDINGS).unlink()
    (run_copy / "output_grid.png").write_bytes(b"no picture")
    result = run_script(INSPECT, run_copy)
    assert result.returncode == 3
    assert LATENTS in result.stderr and "output_grid.png" in result.stderr
    assert f"{EMBEDDINGS}: missing" in result.stdout
    assert f"{LATENTS}: damaged" in result.stdout and "checksum" in result.stdout

    save_file({"latents": torch.tensor([[1.0, float("nan")]])}, run_copy / LATENTS)
    (run_copy / "output_grid.png").unlink()
    content = as_json(INSPECT, run_copy)
    foreign = next(file for file in content["files"] if file["name"] == LATENTS)
    assert (foreign["state"], foreign["why"]) == ("unknown", "it has no header of ours")
    assert foreign["tensors"][0]["finite"] is False and foreign["tensors"][0]["max"] == 1.0


def test_a_changed_scheduler_is_named_as_the_first_difference(
    finished_run: Path, run_copy: Path, stage: Run, tmp_path: Path
) -> None:
    for number, flags in ((2, ("--scheduler", "ddim")), (3, ())):
        result = stage(number, "--output_dir", run_copy, *flags)
        assert result.returncode == 0, result.stderr
    content = as_json(COMPARE, finished_run, run_copy, "--output_dir", tmp_path / "differences")
    files = {file["name"]: file for file in content["files"]}
    assert files[EMBEDDINGS]["verdict"] == "identical"
    assert files[LATENTS]["verdict"] == "different"
    change = "scheduler EulerDiscreteScheduler → DDIMScheduler"
    assert files[LATENTS]["recipe"] == change
    assert content["first_difference"] == f"stage 2, {LATENTS}: {change}"
    a, b = (load_file(folder / LATENTS)["latents"].numpy() for folder in (finished_run, run_copy))
    expected = np.linalg.norm(a - b) / np.linalg.norm(a)
    assert files[LATENTS]["tensors"]["latents"] == pytest.approx(expected, rel=1e-5)

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
    assert f"stage 1, {EMBEDDINGS}: identical" in printed and change in printed


def test_equal_runs_and_a_flipped_byte(finished_run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(finished_run, tmp_path / "other"))
    content = as_json(COMPARE, finished_run, other)
    assert content["first_difference"] is None and content["settings"] == {}
    for name in (EMBEDDINGS, LATENTS):
        damaged = bytearray((other / name).read_bytes())
        damaged[-7] ^= 0x10
        (other / name).write_bytes(damaged)
        result = run_script(COMPARE, finished_run, other)
        assert result.returncode == 3
        assert f"{other / name} is damaged" in result.stderr
        assert f"{name}: damaged" in result.stdout
        (other / name).write_bytes((finished_run / name).read_bytes())


@pytest.mark.parametrize("script", [INSPECT, COMPARE, PROJECT_DIR / "tools" / "report_page.py"])
def test_no_run_directory_is_one_sentence(script: Path, tmp_path: Path) -> None:
    arguments = [tmp_path / "nothing"] * (2 if script == COMPARE else 1)
    result: subprocess.CompletedProcess[str] = run_script(script, *arguments)
    assert result.returncode == 3
    assert result.stderr.count("\n") == 1 and "nothing is no folder" in result.stderr


def test_a_page_of_a_folder_without_a_run_is_not_made(tmp_path: Path) -> None:
    result = run_script(PROJECT_DIR / "tools" / "report_page.py", tmp_path)
    assert result.returncode == 3 and "holds no run" in result.stderr
    assert not list(tmp_path.iterdir())
