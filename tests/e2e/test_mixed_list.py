"""One prompts file with four sizes, three schedulers, two LoRAs: each row as a run of it alone."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.files import artifacts, picture_files
from common.files.artifacts import Artifact
from common.files.report import Report, read_report
from common.files.row_reader import RowReader
from common.files.run_files import GENERATION_CONFIG_FILE
from common.files.stage_table import EMBEDDINGS_FILE, LATENTS_FILE
from common.runs.run_index import read_index
from tests.conftest import Run, run_script
from tests.tiny_checkpoints import save_demo_lora

pytestmark = pytest.mark.slow

SIZES: list[dict[str, int]] = [
    {},
    {"height": 96},
    {"height": 64, "width": 96},
    {"height": 128, "width": 64},
]
SCHEDULERS = ["euler", "dpmpp_2m", "ddim"]
ALONE = ("--mesh", "single", "--batch_size", 2, "--fill_groups", "--backend", "jax")


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """Twenty, in which each setting changes from one line to the next."""
    loras = [save_demo_lora(folder / f"{seed}.safetensors", seed=seed, size=0.1) for seed in (1, 2)]
    added: list[Any] = [[], [f"{loras[0]}:0.8"], f"{loras[1]}:-0.5"]
    combined = [*product(range(4), range(3), range(3))]
    return [
        {
            "prompt": f"a {color} star",
            "seed": 100 + number,
            "scheduler": SCHEDULERS[scheduler],
            "loras": added[lora],
            **SIZES[size],
        }
        for number, (size, scheduler, lora) in enumerate(combined[7 * k % 36] for k in range(20))
        for color in ["red", "blue", "green"][number % 3 : number % 3 + 1]
    ]


def run(stage: Run, folder: Path, lines: list[dict[str, Any]], *flags: object) -> None:
    path = folder.with_suffix(".jsonl")
    path.write_text("\n".join(map(json.dumps, lines)))
    size = ("--height", 64, "--width", 64, "--num_inference_steps", 3)
    for number, own in ((1, ("--prompts_file", path, *size)), (2, flags), (3, flags)):
        result = stage(number, "--output_dir", folder, "--skip_fresh", *own)
        assert result.returncode == 0, result.stderr


def rows_of(folder: Path, name: str) -> tuple[Artifact, list[dict[str, torch.Tensor]]]:
    found = artifacts.inspect(folder / name)
    reader = RowReader(found, lambda text: pytest.fail(text))
    return found, [reader.read([row]) for row in range(sum(map(len, reader.sizes)))]


def pictures_of(folder: Path) -> list[np.ndarray]:
    return [picture_files.read_pixels(folder / line["file"]) for line in read_index(folder)]


def report_of(folder: Path, stage: int) -> Report:
    report = read_report(folder, stage)
    assert report is not None
    return report


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, stage: Run) -> Path:
    folder = tmp_path_factory.mktemp("lists")
    run(stage, folder / "mixed", lines_of(folder), *ALONE)
    return folder / "mixed"


@pytest.mark.long
def test_each_row_is_that_of_a_run_of_it_alone(mixed: Path, quick_stage: Run) -> None:
    made = {name: rows_of(mixed, name) for name in (EMBEDDINGS_FILE, LATENTS_FILE)}
    pictures = pictures_of(mixed)
    for number, line in enumerate(lines_of(mixed.parent)):
        alone = mixed.parent / f"alone_{number}"
        run(quick_stage, alone, [line], *ALONE)
        for name, (artifact, rows) in made.items():
            own_artifact, (own,) = rows_of(alone, name)
            assert artifact.header is not None and own_artifact.header is not None
            expected = own_artifact.header.rows[0].fingerprint
            assert artifact.header.rows[number].fingerprint == expected
            assert own.keys() == rows[number].keys()
            for key, tensor in own.items():
                # The group has the same shape, and its other images change nothing.
                assert rows[number][key].equal(tensor)
        (picture,) = pictures_of(alone)
        assert np.array_equal(pictures[number], picture)
        made_record, own_record = (
            picture_files.read_picture_record(folder / read_index(folder)[place]["file"])
            for folder, place in ((mixed, number), (alone, 0))
        )
        assert made_record is not None and own_record is not None
        assert made_record["fingerprint"] == own_record["fingerprint"]
        assert made_record["settings"] == own_record["settings"]


def test_a_program_for_each_size_and_kind(mixed: Path) -> None:
    """Schedulers and LoRAs are data."""
    programs = report_of(mixed, 2).programs
    assert programs is not None
    assert [program.name for program in programs.each] == ["denoise_guided"] * 4
    decoded = report_of(mixed, 3).programs
    assert decoded is not None and len(decoded.each) == 4


def test_files_of_several_sizes(mixed: Path) -> None:
    sizes = ("64x64", "64x96", "96x64", "64x128")
    latents, _ = rows_of(mixed, LATENTS_FILE)
    assert latents.tensors.keys() == {f"latents_{size}" for size in sizes}
    shapes = report_of(mixed, 3).shapes
    assert shapes.keys() == {f"images_{size}" for size in sizes}
    assert sum(shape[0] for shape in shapes.values()) == 20
    assert shapes["images_96x64"][1:] == [64, 96, 3]
    grid = picture_files.read_pixels(mixed / "output_grid.png")
    assert grid.shape == (4 * 128, 5 * 96, 3)


def test_what_is_streamed_and_what_is_picked(mixed: Path, tmp_path: Path, run_all: Run) -> None:
    lines, pictures = lines_of(mixed.parent), pictures_of(mixed)
    some = [0, 1, 2, 3, 8]
    path = tmp_path / "some.jsonl"
    path.write_text("\n".join(json.dumps(lines[row]) for row in some))
    streamed, picked = tmp_path / "streamed", tmp_path / "picked"
    settings = ("--prompts_file", path, "--height", 64, "--width", 64, "--num_inference_steps", 3)
    result = run_all("--output_dir", streamed, "--stream", *settings, *ALONE)
    assert result.returncode == 0, result.stderr
    result = run_script("tools/pick.py", mixed, ",".join(map(str, some)), "--output_dir", picked)
    assert result.returncode == 0 and "0 of 5 to make" in result.stdout, result.stderr
    for folder in (streamed, picked):
        for own, row in zip(pictures_of(folder), some, strict=True):
            assert np.array_equal(own, pictures[row])
    assert artifacts.inspect(streamed / LATENTS_FILE).data_sha256 == (
        artifacts.inspect(picked / LATENTS_FILE).data_sha256
    )


def test_a_changed_list_takes_the_rows_that_are_there(mixed: Path, quick_stage: Run) -> None:
    lines, before = lines_of(mixed.parent), rows_of(mixed, LATENTS_FILE)[1]
    pictures = pictures_of(mixed)
    order = [*range(19, 0, -1)]  # one is gone
    changed = [lines[row] for row in order]
    changed[4] = changed[4] | {"height": 160}
    changed[9] = changed[9] | {"loras": changed[10]["loras"]}
    assert changed[9]["loras"] != lines[order[9]]["loras"]
    run(quick_stage, mixed, changed, *ALONE)
    after, taken = rows_of(mixed, LATENTS_FILE)[1], pictures_of(mixed)
    for place, row in enumerate(order):
        if place not in (4, 9):
            assert after[place]["latents"].equal(before[row]["latents"])
            assert np.array_equal(taken[place], pictures[row])
    assert after[4]["latents"].shape[2] == 160 // 8
    assert not after[9]["latents"].equal(before[order[9]]["latents"])
    assert [report_of(mixed, stage).rows_taken for stage in (1, 2, 3)] == [18, 17, 17]
    assert (mixed / GENERATION_CONFIG_FILE).exists()
