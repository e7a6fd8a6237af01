"""What a job's run directory tells of it: its settings, where its time went, its files."""

import stat
from pathlib import Path
from typing import Any

from common.errors import StageError
from common.files.report import read_report
from common.files.stage_table import STAGES
from common.runs.generation import read_generation_config
from common.runs.run_index import read_index
from common.serving.jobs import Job

TEXTS = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2")
FACTS = ("backend", "device", "devices", "dtype", "mesh")  # of a report


def lineage_of(job: Job) -> dict[str, Any]:
    """As far as the files are there; of paths their names alone."""
    run_dir = job.run_dir
    try:
        settings = _named(read_generation_config(run_dir).model_dump(mode="json"))
    except StageError:
        settings = {}
    return {
        "settings": {name: value for name, value in settings.items() if value not in (None, [])},
        "images": [
            {name: line[name] for name in ("index", "prompt", "seed") if name in line}
            for line in read_index(run_dir)
        ],
        "reports": reports_of(run_dir),
        "artifacts": [
            {"file": path.relative_to(run_dir).as_posix(), "bytes": size}
            for path in sorted(run_dir.rglob("[!.]*"))
            if (size := _size_of(path)) is not None
        ],
    }


def _size_of(path: Path) -> int | None:
    """A file's, in bytes; None of a folder, and of what is removed just now."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def reports_of(run_dir: Path) -> list[dict[str, Any]]:
    """Where each stage's time went, in the stages' order."""
    found = []
    for stage in STAGES:
        report = read_report(run_dir, stage.number)
        if report is not None:
            parts = report.seconds.model_dump()
            found.append(
                {
                    "stage": stage.number,
                    "wall_seconds": report.wall_seconds,
                    "seconds": {name: value for name, value in parts.items() if value > 0},
                    **report.model_dump(mode="json", include={*FACTS}),
                }
            )
    return found


def _named(value: Any) -> Any:
    """A setting's value with names in the place of absolute paths; texts stay as they are."""
    if isinstance(value, dict):
        return {k: each if k in TEXTS else _named(each) for k, each in value.items()}
    if isinstance(value, list):
        return [_named(each) for each in value]
    is_path = isinstance(value, str) and (value.startswith("~") or Path(value).is_absolute())
    return Path(value).name if is_path else value
