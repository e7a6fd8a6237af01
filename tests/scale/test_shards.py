"""Shards: their rows are those of one run of the whole list, and change with what they are of."""

import datetime
import json
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from common.errors import UnfitEnvironmentError
from common.runs.generation import RunSettings, read_run_settings, resolve
from common.scale.shards import Shard, about_file, plan_shards
from tests.refusals import refusal

ROWS: list[dict[str, Any]] = [
    {"prompt": "a"},
    {"prompt": "b", "seed": 7},
    {"prompt": "c", "seed": "3-5"},
    {"prompt": "d", "num_images_per_prompt": 3},
    {"prompt": "e", "id": "own"},
    {"prompt": "f", "seed": [9, 8]},
    {"prompt": "g", "negative_prompt": "h", "guidance_scale": 2.0},
    *({"prompt": f"more {k}"} for k in range(5)),
]


def write(path: Path, rows: list[dict[str, Any]] | list[str]) -> str:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


def plan(file: str, settings: RunSettings, whole: str = "", images: int = 4) -> list[Shard]:
    return list(plan_shards([file], settings, images=images, whole=whole, content_of=about_file))


def test_images_have_the_seeds_of_one_run(tmp_path: Path) -> None:
    for flags in (
        {"seed": 20},
        {"seed": 20, "num_images_per_prompt": 2, "seed_offset": 1000},
        {"seed": 20, "same_seed": True},
    ):
        file = write(tmp_path / "a.jsonl", ROWS)
        own = read_run_settings(None, {**flags, "prompts_file": Path(file)})
        whole = resolve(own, native_size=64, size_factor=8)
        settings = read_run_settings(None, flags)
        shards = plan(file, settings)
        assert len(shards) > 2 and sum(shard.rows for shard in shards) == len(ROWS)
        texts = [line.text for shard in shards for line in shard.lines(settings)]
        parts = read_run_settings(None, {"prompts_file": write(tmp_path / "b.jsonl", texts)})
        found = resolve(parts, native_size=64, size_factor=8)
        assert found.image_seeds() == whole.image_seeds()
        assert [p.prompt for p in found.prompts] == [p.prompt for p in whole.prompts]
        assert [p.settings for p in found.prompts] == [p.settings for p in whole.prompts]
        assert [p.id for p in found.prompts] == [f"{row:09d}" for row in range(len(ROWS))]
        assert [shard.first_image for shard in shards[1:]] == [
            sum(shard.images for shard in shards[:k]) for k in range(1, len(shards))
        ]


def test_a_shard_is_read_again_as_it_was_planned(tmp_path: Path) -> None:
    settings = read_run_settings(None, {})
    files = [write(tmp_path / f"{name}.jsonl", ROWS) for name in "ab"]
    shards = list(plan_shards(files, settings, images=5, whole="", content_of=about_file))
    rows = [row for shard in shards for row in shard.lines(settings)]
    assert [row.row for row in rows] == list(range(2 * len(ROWS)))
    for shard in shards:
        assert Shard.from_json(shard.to_json()) == shard
        again = list(Shard.from_json(shard.to_json()).lines(settings))
        assert len(again) == shard.rows and sum(line.images for line in again) == shard.images
    assert any(len(shard.parts) == 2 for shard in shards)


def test_a_row_that_is_none_has_a_place_and_a_sentence(tmp_path: Path) -> None:
    settings = read_run_settings(None, {})
    bad = ["{", '{"prompt": "a", "colour": 3}', '{"prompt": "a", "vae": "x"}', '{"seed": 3}']
    file = write(tmp_path / "a.jsonl", [json.dumps({"prompt": "a"}), *bad, '{"prompt": "z"}'])
    (shard,) = plan(file, settings, images=100)
    lines = list(shard.lines(settings))
    for line in lines[1:-1]:
        assert line.failure is not None and line.failure.exit_code == 2
        assert line.failure.where == line.where and f"line {line.row + 1}" in line.failure.error
    assert json.loads(lines[-1].text)["seed"] == 42 + 5  # as if the others were mended


def test_only_what_changed_has_another_name(tmp_path: Path) -> None:
    settings = read_run_settings(None, {})
    image = tmp_path / "a.png"
    image.write_bytes(b"1")
    other = tmp_path / "b.png"
    other.write_bytes(b"1")
    rows = [{"prompt": str(k), "image": str(other)} for k in range(12)]
    rows[9]["image"] = str(image)
    rows[2] = {"prompt": "none", "colour": "red"}
    before = plan(write(tmp_path / "a.jsonl", rows), settings)

    def changed(after: list[Shard]) -> list[int]:
        pairs = zip(before, after, strict=True)
        return [k for k, (one, other) in enumerate(pairs) if one.name != other.name]

    assert changed(plan(write(tmp_path / "b.jsonl", rows), settings)) == []
    rows[5]["prompt"] = "other"
    assert changed(plan(write(tmp_path / "a.jsonl", rows), settings)) == [1]
    rows[5]["prompt"] = "5"
    assert changed(plan(write(tmp_path / "a.jsonl", rows), settings, whole="x")) == [0, 1, 2]
    image.write_bytes(b"12")
    assert changed(plan(write(tmp_path / "a.jsonl", rows), settings)) == [2]


def test_files_that_a_row_names_count_by_size_and_time(tmp_path: Path) -> None:
    settings, lora = read_run_settings(None, {}), tmp_path / "a.safetensors"
    lora.write_bytes(b"1")
    assert about_file(str(lora))[:2] == [str(lora), 1] and about_file("no such") == ["no such"]
    csv = tmp_path / "a.csv"
    csv.write_text(f'prompt,loras\na,"{lora}:0.5;{lora}"\n')
    listed = write(tmp_path / "a.jsonl", [{"prompt": "a", "loras": [f"{lora}:0.5", str(lora)]}])
    for file in (str(csv), listed):
        (before,) = plan(file, settings)
        (line,) = before.lines(settings)
        assert line.files == (str(lora), str(lora))
        lora.write_bytes(lora.read_bytes() + b"2")
        (after,) = plan(file, settings)
        assert after.name != before.name and after.of_rows == before.of_rows


def test_a_list_that_changed_meanwhile_is_told(tmp_path: Path) -> None:
    settings, rows = read_run_settings(None, {}), [{"prompt": str(k)} for k in range(8)]
    shards = plan(write(tmp_path / "a.jsonl", rows), settings)
    write(tmp_path / "a.jsonl", [*rows[:5], {"prompt": "x"}, *rows[6:]])
    assert len(shards[0].lines(settings)) == 4
    with refusal(UnfitEnvironmentError, "a.jsonl is not what it was when the list was read"):
        shards[1].lines(settings)
    write(tmp_path / "a.jsonl", rows[:6])
    with refusal(UnfitEnvironmentError, "is not what it was"):
        shards[1].lines(settings)


def test_values_that_no_list_has_are_their_rows_fault(tmp_path: Path) -> None:
    settings = read_run_settings(None, {})
    rows = [
        '{"prompt": "a", "guidance_scale": NaN}',
        '{"prompt": "\\ud800"}',
        '{"prompt": "b"}',
    ]
    (shard,) = plan(write(tmp_path / "a.jsonl", rows), settings)
    lines = shard.lines(settings)
    assert [line.failure is None for line in lines] == [False, False, True]
    table = pyarrow.table({"prompt": ["a", "b"], "when": [datetime.date(2026, 1, 1), None]})
    parquet.write_table(table, tmp_path / "a.parquet")
    (shard,) = plan(str(tmp_path / "a.parquet"), settings)
    assert [line.failure is None for line in shard.lines(settings)] == [False, True]
