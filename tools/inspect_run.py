"""Show what lies in a run directory: tensors, settings, what was made from what, what is stale.

python tools/inspect_run.py stage_outputs
python tools/inspect_run.py stage_outputs --json
python tools/inspect_run.py stage_outputs --image 137
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
from common.errors import BadInputFileError, BadSettingError
from common.files.picture_files import read_picture_record
from common.files.run_files import DEFAULT_OUTPUT_DIR
from common.messages import say
from common.process import run_command
from common.runs.passes import passes_in
from common.runs.record import DAMAGED, MISSING, FileRecord, RunRecord, read_run, summarize_tensors
from common.runs.redo import commands
from common.runs.run_index import read_index

INSPECT = "What to show"


def main(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The run directory.")] = Path(
        DEFAULT_OUTPUT_DIR
    ),
    json: Annotated[bool, flag("json", " ", INSPECT, "Print JSON.")] = False,
    image: Annotated[
        str | None, flag("image", "N", INSPECT, "One image: its index, or its picture's file.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Show a run's artifacts and whether they are fresh. Ends with 3 where a file is damaged.

    Of an image, its settings, and the commands that make it alone again. RUN_DIR may be a picture.
    """
    if image is not None or run_dir.is_file():
        found = read_image(run_dir, image)
        lines = [json_module.dumps(found, indent=2, ensure_ascii=False)]
        for line in lines if json else lines_of_image(found):
            say(line)
        return
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


def read_image(place: Path, image: str | None) -> dict[str, Any]:
    """All that is known of an image, and what makes it alone again.

    Args:
        place: its run directory, or its picture.
        image: its index in the run, or its picture's name.
    """
    path = place if image is None or place.is_file() else find_picture(place, image)
    record = read_picture_record(path)
    if record is None:
        raise BadInputFileError(f"{path} is damaged or no picture of ours: name one of a run")
    flags, made_by = record.get("flags", {}), record.get("made_by", {})
    known = bool(flags) and "flags" not in record.get("shortened", ())
    output_dir = DEFAULT_OUTPUT_DIR / f"{path.stem}_again"
    kept = ("settings", "overrides", "inputs", "weights", "versions", "fingerprint")
    return {
        "file": str(path),
        **{name: record.get(name) for name in kept},
        "made_by": made_by,
        "commands": commands(flags, made_by, output_dir) if known else [],
        "notes": [*notes_on(flags)] if known else [NOT_KNOWN],
    }


def find_picture(run_dir: Path, image: str) -> Path:
    """The picture of a run that an index or a name stands for."""
    lines = read_index(run_dir)
    if not lines:
        raise BadInputFileError(f"{run_dir} has no list of its pictures: run stage 3")
    for line in lines:
        if image in (str(line.get("index")), line["file"]):
            return run_dir / line["file"]
    raise BadSettingError(f"--image {image}: {run_dir} has images 0 to {len(lines) - 1}")


def lines_of_image(found: dict[str, Any]) -> Iterator[str]:
    """The same as lines to read."""
    yield found["file"]
    for name, value in found["settings"].items():
        if value not in (None, [], {}, ""):
            yield f"  {name}: {value if isinstance(value, str) else json_module.dumps(value)}"
    for name, (before, after) in found["overrides"].items():
        yield f"  overridden: {name} {before} → {after}"
    sources = [f"{name} ({sha[:12]}…)" for name, sha in found["inputs"].items()]
    yield f"  made from {', '.join([*sources, *found['weights']])}"
    if found["commands"]:
        yield "  alone again, to the bit, on as many threads of a CPU or devices of the kind:"
    yield from (f"    {command}" for command in found["commands"])
    yield from (f"  {note}" for note in found["notes"])


NOT_KNOWN = (
    "how it is made again is not known: its latents came from elsewhere, it is a grid, or a JPEG "
    "without room for that"
)


def notes_on(flags: dict[str, Any]) -> Iterator[str]:
    """What keeps an image from being made alone to the bit."""
    if "init_latents" in flags:
        begun = flags["init_latents"]
        yield f"it begins with its own of the latents of {begun}: tools/pick.py copies that image"
    if flags.get("prompt_weighting") == "compel":
        yield "compel encodes all prompts of a run at once: alone the last bits may be others"
    if flags.get("long_prompts") == "chunk":
        yield "a run's prompts are as long as its longest: alone its embeddings may be shorter"


if __name__ == "__main__":
    run_command(make_command(main))
