"""Compare two runs: settings, tensors and pictures, and the first stage where they part.

python tools/compare_runs.py stage_outputs/a stage_outputs/b
python tools/compare_runs.py A B --output_dir differences      # difference pictures go there
"""

import json as json_module
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.stopping import stop_at_once_on_signals

if __name__ == "__main__":  # the other imports take a second
    stop_at_once_on_signals()

import numpy as np
import typer

from common.commands import Debug, flag, make_command
from common.errors import BadInputFileError
from common.files import recipe
from common.files.picture_files import read_pixels
from common.files.stage_table import STAGES
from common.messages import say
from common.process import run_command
from common.runs.record import DAMAGED, MISSING, FileRecord, RunRecord, read_run
from common.whole_files import write_bytes_whole

COMPARE = "What to compare"
DIFFERENCE_GAIN = 4  # a difference picture shows differences so many times as large


@dataclass(kw_only=True)
class Comparison:
    """A file in two runs."""

    name: str
    stage: int
    verdict: str  # identical, different, only in A, only in B, damaged
    recipe: str = ""  # what differs in settings, inputs, weights and versions, in words
    problem: str = ""  # of a damaged file
    tensors: dict[str, float | None] = field(default_factory=dict)  # ‖a − b‖ / ‖a‖
    psnr: float | None = None  # decibels, of a picture; None where they are identical
    picture: str = ""  # where their difference was written


def main(
    run_a: Annotated[Path, typer.Argument(metavar="RUN_A", help="A run directory.")],
    run_b: Annotated[Path, typer.Argument(metavar="RUN_B", help="Another one.")],
    output_dir: Annotated[
        Path | None,
        flag("output_dir", "DIR", COMPARE, "For difference pictures. [none written]"),
    ] = None,
    json: Annotated[bool, flag("json", " ", COMPARE, "Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Compare two runs stage by stage. Ends with 3 where a file is damaged."""
    for folder in (run_a, run_b):
        if not folder.is_dir():
            raise BadInputFileError(f"{folder} is no folder: name a run directory")
    a, b = read_run(run_a), read_run(run_b)
    compared = list(compare(a, b, output_dir))
    if not compared:
        raise BadInputFileError(f"{run_a} and {run_b} hold no run: name two run directories")
    if json:
        content = {
            "settings": settings_that_differ(a, b),
            "first_difference": first_difference(compared),
            "files": [asdict(item) for item in compared],
        }
        say(json_module.dumps(content, indent=2, ensure_ascii=False, allow_nan=False))
    else:
        for line in lines_of(a, b, compared):
            say(line)
    problems = [item.problem for item in compared if item.problem]
    if problems:
        raise BadInputFileError("; ".join(problems))


def settings_that_differ(a: RunRecord, b: RunRecord) -> dict[str, list[Any]]:
    """Setting of `generation_config.json` → its values in both runs."""
    ours, theirs = (
        {} if run.config is None else json_module.loads(run.config.model_dump_json())
        for run in (a, b)
    )
    return {
        name: [ours.get(name), theirs.get(name)]
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    }


def compare(a: RunRecord, b: RunRecord, output_dir: Path | None) -> Iterator[Comparison]:
    """Compare each file that either run has, in the order of the stages."""
    names = {file.name: file.stage for run in (a, b) for file in run.files}
    order = [stage.number for stage in STAGES]
    for name, stage in sorted(names.items(), key=lambda item: (order.index(item[1]), item[0])):
        ours, theirs = a.file(name), b.file(name)
        here = [file is not None and file.state != MISSING for file in (ours, theirs)]
        result = Comparison(name=name, stage=stage, verdict="")
        damaged = [file for file in (ours, theirs) if file is not None and file.state == DAMAGED]
        if damaged:
            result.verdict, result.problem = (
                "damaged",
                "; ".join(
                    file.why if str(name) in file.why else f"{name}: {file.why}" for file in damaged
                ),
            )
        elif not all(here):
            if not any(here):
                continue
            result.verdict = f"only in {'A' if here[0] else 'B'}"
        else:
            assert ours is not None and theirs is not None
            _compare_content(result, a.run_dir, b.run_dir, ours, theirs, output_dir)
        yield result


def _compare_content(
    result: Comparison,
    dir_a: Path,
    dir_b: Path,
    ours: FileRecord,
    theirs: FileRecord,
    output_dir: Path | None,
) -> None:
    if ours.recipe is not None and theirs.recipe is not None:
        result.recipe = recipe.difference(ours.recipe, theirs.recipe) or ""
    same = ours.data_sha256 == theirs.data_sha256
    result.verdict = "identical" if same else "different"
    if same:
        return
    if result.name.endswith(".safetensors"):
        result.tensors = tensor_differences(dir_a / result.name, dir_b / result.name)
    else:
        pictures = [read_pixels(folder / result.name) for folder in (dir_a, dir_b)]
        if pictures[0].shape != pictures[1].shape:
            heights = " and ".join(f"{p.shape[1]}×{p.shape[0]}" for p in pictures)
            result.recipe = ", ".join(filter(None, [result.recipe, f"sizes {heights}"]))
        else:
            result.psnr = psnr(*pictures)
            if output_dir is not None:
                result.picture = str(save_difference(output_dir, result.name, *pictures))


def tensor_differences(file_a: Path, file_b: Path) -> dict[str, float | None]:
    """Tensor → ‖a − b‖ / ‖a‖ in float64; None where shapes differ or one file lacks it."""
    import torch
    from safetensors.torch import load_file

    ours, theirs = load_file(file_a), load_file(file_b)
    found: dict[str, float | None] = {}
    for name in sorted(ours.keys() | theirs.keys()):
        x, y = ours.get(name), theirs.get(name)
        found[name] = None
        if x is not None and y is not None and x.shape == y.shape:
            x, y = x.to(torch.float64), y.to(torch.float64)
            value = float((x - y).norm() / x.norm()) if bool(x.any()) else float((x - y).norm())
            found[name] = value if math.isfinite(value) else None
    return found


def psnr(a: np.ndarray, b: np.ndarray) -> float | None:
    """Peak signal-to-noise ratio in decibels of 8-bit pictures; None for equal ones."""
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return None if error == 0 else 10 * math.log10(255**2 / error)


def save_difference(output_dir: Path, name: str, a: np.ndarray, b: np.ndarray) -> Path:
    """Write both pictures and their difference, enlarged, side by side."""
    from io import BytesIO

    from PIL import Image

    distance = np.abs(a.astype(int) - b.astype(int)) * DIFFERENCE_GAIN
    side_by_side = np.concatenate([a, b, np.minimum(distance, 255).astype(np.uint8)], axis=1)
    path, file = output_dir / f"difference_{name.replace('.', '_')}.png", BytesIO()
    Image.fromarray(side_by_side).save(file, format="PNG")
    write_bytes_whole(path, file.getvalue())
    return path


def first_difference(compared: list[Comparison]) -> str | None:
    """The first stage where two runs part, and what differs there; None where they are equal."""
    for item in compared:
        if item.verdict != "identical":
            why = item.recipe or item.problem or item.verdict
            return f"stage {item.stage}, {item.name}: {why}"
    return None


def lines_of(a: RunRecord, b: RunRecord, compared: list[Comparison]) -> Iterator[str]:
    """A comparison as lines to read."""
    yield f"A {a.run_dir}"
    yield f"B {b.run_dir}"
    for run in (a, b):
        if run.problem:
            yield f"  {run.problem}"
    for name, (ours, theirs) in settings_that_differ(a, b).items():
        yield f"  setting {name}: {_brief(ours)} → {_brief(theirs)}"
    for item in compared:
        yield f"stage {item.stage}, {item.name}: {item.verdict}"
        if item.recipe:
            yield f"  made with {item.recipe}"
        for name, value in item.tensors.items():
            said = "not comparable" if value is None else f"{value:.3e}"
            yield f"  {name}: relative difference {said}"
        if item.psnr is not None:
            yield f"  PSNR {item.psnr:.1f} dB"
        if item.picture:
            yield f"  A, B and their difference × {DIFFERENCE_GAIN}: {item.picture}"
    first = first_difference(compared)
    yield "the runs are identical" if first is None else f"first difference: {first}"


def _brief(value: Any) -> str:
    text = json_module.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"


if __name__ == "__main__":
    run_command(make_command(main))
