"""A report reads back as it was written, and its schema is the one that is published."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from common.files.report import Repeat, Report, Seconds, json_schema, read_report, report_path
from tests.conftest import PROJECT_DIR

REPORT: dict[str, Any] = {
    "stage": 2,
    "written_at": "2026-01-01T00:00:00+0000",
    "wall_seconds": 1.5,
    "seconds": {"imports": 1.0, "run": 0.5},
    "peak_host_bytes": 1,
    "shapes": {"latents": [1, 4, 8, 8]},
    "dtype": "float32",
    "dtype_asked": "auto",
    "backend": "jax",
    "platform": "cpu",
    "device": "cpu",
    "devices": 1,
    "versions": {"torch": "1"},
}


def write(folder: Path, content: str) -> None:
    report_path(folder, 2).write_text(content)


def test_a_report_reads_back(tmp_path: Path) -> None:
    report = Report.model_validate(REPORT)
    write(tmp_path, report.model_dump_json())
    assert (tmp_path / "stage2_report.json").exists()
    assert read_report(tmp_path, 2) == report
    assert read_report(tmp_path, 3) is None


@pytest.mark.parametrize(
    "content",
    ["", "{", "[1]", json.dumps(REPORT | {"unknown": 1}), json.dumps(REPORT | {"devices": "x"})],
)
def test_what_is_no_report_of_ours_is_none(tmp_path: Path, content: str) -> None:
    write(tmp_path, content)
    assert read_report(tmp_path, 2) is None


def test_the_published_schema_is_this_one() -> None:
    """And it explains every part of the time."""
    assert (PROJECT_DIR / "docs" / "stage_report.schema.json").read_text() == json_schema()
    seconds = json.loads(json_schema())["$defs"]["Seconds"]["properties"]
    assert seconds.keys() == Seconds.model_fields.keys()
    assert all(part.get("description") for part in seconds.values())


def test_repeats_are_summed_up_as_statistics_does() -> None:
    seconds = [0.3, 0.1, 0.2000001]
    repeat = Repeat.of(seconds)
    assert (repeat.min, repeat.max) == (0.1, 0.3)
    assert repeat.median == round(statistics.median(seconds), 6)
    assert len(repeat.seconds) == 3
