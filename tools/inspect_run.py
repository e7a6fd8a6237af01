"""Show what lies in a run directory: tensors, settings, what was made from what, what is stale.

python tools/inspect_run.py stage_outputs
python tools/inspect_run.py stage_outputs --json
"""

import json as json_module
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.stopping import stop_at_once_on_signals

if __name__ == "__main__":  # the other imports take a second
    stop_at_once_on_signals()

import typer

from common.commands import Debug, flag, make_command
from common.errors import BadInputFileError
from common.files.run_files import DEFAULT_OUTPUT_DIR
from common.messages import say
from common.process import run_command
from common.runs.passes import passes_in
from common.runs.record import DAMAGED, MISSING, FileRecord, RunRecord, read_run, summarize_tensors

INSPECT = "What to show"


def main(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The run directory.")] = Path(
        DEFAULT_OUTPUT_DIR
    ),
    json: Annotated[bool, flag("json", " ", INSPECT, "Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Show a run's artifacts and whether they are fresh. Ends with 3 where a file is damaged."""
    if not run_dir.is_dir():
        raise BadInputFileError(f"{run_dir} is no folder: name a run directory")
    run = read_run(run_dir)
    content = as_json(run)
    if json:
        say(json_module.dumps(content, indent=2, ensure_ascii=False, allow_nan=False))
    else:
        for line in lines_of(run, content):
            say(line)
    damaged = [file.name for file in run.files if file.state == DAMAGED]
    if damaged:
        raise BadInputFileError(f"{run_dir}: damaged: {', '.join(damaged)}")


def as_json(run: RunRecord) -> dict[str, Any]:
    """All that is known of a run's files."""
    return {
        "run_dir": str(run.run_dir),
        "problem": run.problem,
        "files": [file_as_json(run, file) for file in run.files],
    }


def file_as_json(run: RunRecord, file: FileRecord) -> dict[str, Any]:
    """One file: its state, header, lineage and tensors."""
    path = run.run_dir / file.name
    readable = path.suffix == ".safetensors" and file.state not in (MISSING, DAMAGED)
    return {
        "name": file.name,
        "stage": file.stage,
        "state": file.state,
        "why": file.why,
        "made_from": file.made_from,
        "data_sha256": file.data_sha256,
        "recipe": None if file.recipe is None else file.recipe.model_dump(),
        "provenance": file.provenance,
        "tensors": [asdict(tensor) for tensor in summarize_tensors(path)] if readable else [],
    }


def lines_of(run: RunRecord, content: dict[str, Any]) -> Iterator[str]:
    """The same as lines to read."""
    yield f"{run.run_dir}"
    if run.problem:
        yield f"  {run.problem}"
    for file, found in zip(run.files, content["files"], strict=True):
        why = f" ({file.why})" if file.why else ""
        yield f"{file.name}: {file.state}{why}"
        sources = ", ".join(f"{name} ({sha[:12]}…)" for name, sha in file.made_from.items())
        if file.recipe is not None:
            weights = ", ".join(file.recipe.weights)
            yield f"  made from {' and '.join(part for part in (sources, weights) if part)}"
        if "written_at" in file.provenance:
            by = f" by {file.provenance['backend']}" if "backend" in file.provenance else ""
            yield f"  written {file.provenance['written_at']}{by}, data {file.data_sha256[:12]}…"
        for tensor in found["tensors"]:
            shape = "×".join(map(str, tensor["shape"]))
            values = ", ".join(
                f"{name} {tensor[name]:.4g}"
                for name in ("min", "mean", "max", "std")
                if tensor[name] is not None
            )
            finite = "" if tensor["finite"] else "; NOT ALL FINITE"
            yield f"  {tensor['name']:30} {tensor['dtype']:5} {shape:16} {values}{finite}"
    for folder in passes_in(run.run_dir):
        yield f"{folder.name}/ is a further pass, a run of its own: inspect {folder}"


if __name__ == "__main__":
    run_command(make_command(main))
