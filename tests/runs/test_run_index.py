"""`images.jsonl` and the same list as CSV and Parquet, read by others' readers."""

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from common.errors import UnfitEnvironmentError
from common.runs import run_index
from common.runs.run_index import (
    INDEX_FILE,
    RunIndex,
    differing,
    find_ours,
    read_index,
    require_parquet,
    why_index_stale,
)
from tests.refusals import refusal

PROMPT = 'a "red" star,\nbig\u2028'
LINES: list[dict[str, Any]] = [
    {
        "file": "a.png",
        "index": 0,
        "prompt": 'a "red" star,\nbig\u2028',
        "seed": 1,
        "fingerprint": "f",
    },
    {
        "file": "b.png",
        "index": 1,
        "prompt": "a ring",
        "seed": 2,
        "size": [1, 2],
        "fingerprint": "g",
    },
]


def test_it_grows_and_keeps_what_an_earlier_one_knew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_index, "SECONDS_BETWEEN_WRITES", 0.0)
    index = RunIndex(tmp_path, LINES, None)
    index.add(1, 0.25)
    index.write_if_due()
    assert [line["file"] for line in read_index(tmp_path)] == ["b.png"]
    index.add(0, 0.5)
    index.write()
    assert [json.loads(t) for t in (tmp_path / INDEX_FILE).read_text().strip().split("\n")] == [
        LINES[0] | {"seconds": 0.5},
        LINES[1] | {"seconds": 0.25},
    ]
    assert why_index_stale(tmp_path, LINES, None) is None
    assert why_index_stale(tmp_path, LINES, "csv") == "images.csv is not there"
    assert why_index_stale(tmp_path, LINES[:1], None) == f"{INDEX_FILE} is of other pictures"

    moved = RunIndex(tmp_path, [LINES[1] | {"file": "a.png", "index": 0}], "csv")
    moved.add(0)  # taken
    moved.write_if_due()  # what an earlier run made is listed until it is removed
    found = [(line["file"], line.get("earlier", False)) for line in read_index(tmp_path)]
    assert found == [("a.png", False), ("b.png", True)]
    moved.write()
    assert [(line["file"], line["seconds"]) for line in read_index(tmp_path)] == [("a.png", 0.25)]
    (tmp_path / INDEX_FILE).unlink()
    assert why_index_stale(tmp_path, LINES, None) == f"{INDEX_FILE} is not there"


def test_others_read_the_same(tmp_path: Path) -> None:
    for kind in ("csv", "parquet"):
        index = RunIndex(tmp_path, LINES, kind)  # type: ignore[arg-type]
        for row in range(2):
            index.add(row, 1.5)
        index.write()
        if kind == "csv":
            with (tmp_path / "images.csv").open(newline="", encoding="utf-8") as file:
                rows = [*csv.DictReader(file)]
            assert rows[0]["prompt"] == LINES[0]["prompt"] and rows[1]["size"] == "[1, 2]"
            assert rows[0]["size"] == "" and rows[1]["seconds"] == "1.5"
    assert not (tmp_path / "images.csv").exists()  # of an earlier run
    table = parquet.read_table(tmp_path / "images.parquet").to_pylist()
    assert table[0]["prompt"] == LINES[0]["prompt"] and table[0]["size"] is None
    assert (table[1]["seed"], table[1]["size"]) == (2, "[1, 2]")


def test_a_missing_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    require_parquet()
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with refusal(UnfitEnvironmentError, "--index parquet needs", "pip install pyarrow, or use csv"):
        require_parquet()


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]\n", '{"file": 1, "fingerprint": ""}\n', '{"file": "a", "fingerprint": ["f"]}\n'],
)
def test_a_damaged_index_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX_FILE).write_text(text)
    assert read_index(tmp_path) == []


def test_our_pictures_are_those_of_our_names_and_of_the_index(tmp_path: Path) -> None:
    ours = ["a.png", "output_grid.jpg", "output_image_0001.webp"]
    for name in (*ours, "holiday.png", "output_image.txt"):
        (tmp_path / name).write_text("")
    (tmp_path / INDEX_FILE).write_text(
        '{"file": "a.png", "fingerprint": ""}\n{"file": "../b.png", "fingerprint": ""}\n'
    )
    found = [path.name for path in find_ours(tmp_path)]
    assert found == ours
    assert find_ours(tmp_path / "nowhere") == []


def test_what_differs_is_told_of_any() -> None:
    assert differing([{"a": 1, "b": 2}, {"a": 1, "b": 3}, {"a": 1, "b": 2, "c": None}]) == {"b"}
    assert differing([{"a": 1}]) == set()
