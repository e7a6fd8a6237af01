"""Runs over all combinations of some settings' values, each stage as often as it is needed."""

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import product
from pathlib import Path
from shlex import split as split_words
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from common.errors import BadInputFileError, BadSettingError
from common.files.stage_table import FIRST, OF_EVERY_RUN, Stage, maker_of
from common.runs.flags import Flag, all_flags
from common.runs.generation import read_run_settings
from common.runs.prompts_file import read_prompts_file
from common.stopping import STOP_SIGNALS
from common.whole_files import write_text_whole

# Settings by which a run may begin with pictures.
OF_PICTURES = ("image", "prompts_file", "config")
SWEEP_FILE = "sweep.json"
SWEEP_FOLDER = "sweep"
MOST_NAME, MOST_FOLDER = 40, 200  # bytes of a value and of a whole folder's name


class Cell(BaseModel):
    """One combination."""

    model_config = ConfigDict(extra="forbid")

    values: dict[str, str]
    folder: str  # below the run directory, of the pictures
    sources: list[str]  # the same of what stages 1 and 2 wrote
    exit_code: int | None = None  # None: not run yet
    error: str = ""


class Sweep(BaseModel):
    """`sweep.json`: what was swept, and how each combination ended."""

    model_config = ConfigDict(extra="forbid")

    axes: dict[str, list[str]]
    cells: list[Cell]
    of_pictures: bool = False  # whether the runs may begin with pictures


@dataclass(frozen=True)
class CellRun:
    """One stage to run for one or more cells."""

    stage: Stage
    source: Path  # where its input is
    folder: Path
    values: dict[str, str] = field(default_factory=dict)  # the swept flags it is given


def sweepable() -> dict[str, Flag]:
    """The flags that can be swept, by their names."""
    return {
        flag.name: flag
        for flag in all_flags()
        if flag.has_value and flag.declared.swept and not flag.declared.alone
    }


def parse_sweep(text: str, given: Mapping[str, Any]) -> Sweep:
    """Read "scheduler=euler,ddim num_inference_steps=10,20"; | separates values with commas.

    Args:
        given: the flags that all combinations share.

    Raises:
        BadSettingError: not of that form, or a flag that cannot be swept.
    """
    axes: dict[str, list[str]] = {}
    known = sweepable()
    try:
        words = split_words(text)
    except ValueError as error:
        raise BadSettingError(f"--sweep {text!r} cannot be read ({error})") from None
    for word in words:
        name, separator, listed = word.partition("=")
        name = name.removeprefix("--").replace("-", "_")
        values = [v.strip() for v in listed.split("|" if "|" in listed else ",")]
        if not separator or not all(values):
            raise BadSettingError(
                f"--sweep: {word!r} is not understood: give FLAG=VALUE,VALUE,…, with | between "
                "values that have commas, and spaces between flags"
            )
        if name not in known:
            raise BadSettingError(f"--sweep: {name} is no flag of a stage that can be swept")
        if name in given or name in axes:
            raise BadSettingError(f"--sweep: {name} is given twice; give it in --sweep alone")
        if len(set(values)) < len(values):
            raise BadSettingError(f"--sweep: {name} has the same value twice")
        axes[name] = values
    if not axes:
        raise BadSettingError("--sweep names no flag: give FLAG=VALUE,VALUE,…")
    cells = []
    pictures = any(name in given or name in axes for name in OF_PICTURES)
    for combination in product(*axes.values()):
        chosen = dict(zip(axes, combination, strict=True))
        sources = [folder_of(chosen, stage, known, pictures) for stage in OF_EVERY_RUN[:-1]]
        folder = f"{SWEEP_FOLDER}/{name_of(chosen)}"
        cells.append(Cell(values=chosen, folder=folder, sources=sources))
    return Sweep(axes=axes, cells=cells, of_pictures=pictures)


def refuse_idle_seeds(axes: Collection[str], given: Mapping[str, Any]) -> None:
    """Raise `BadSettingError` where a sweep over seeds would make the same pictures again.

    Args:
        axes: the settings that are swept.
        given: the flags that all cells share.
    """
    if not {"seed", "same_seed"} & {*axes}:
        return
    own = {name: given[name] for name in ("prompt", "prompts_file") if name in given}
    settings = read_run_settings(given.get("config"), own)
    if settings.prompts_file is None:
        return
    prompts = read_prompts_file(Path(settings.prompts_file), settings)
    if all(prompt.has_own_seed for prompt in prompts):
        raise BadSettingError(
            f"--sweep: the seed changes nothing, as all prompts of {settings.prompts_file} have "
            "seeds of their own: sweep seed_offset"
        )


def stage_of(flag: Flag, pictures: bool) -> Stage:
    """The first stage whose output depends on a flag, of those that every run has.

    Pictures are encoded where their run's settings are settled, by the first stage.

    Args:
        pictures: whether the runs may begin with pictures.
    """
    makers = [maker_of(artifact) for artifact in flag.declared.makes]
    others = [stage for stage in makers if stage in OF_EVERY_RUN]
    if len(others) < len(makers) and (pictures or not others):
        return FIRST
    return next(stage for stage in OF_EVERY_RUN if stage in others)


def name_of(values: Mapping[str, str]) -> str:
    """A folder's name for some values."""
    parts = []
    for name, value in values.items():
        plain = re.sub(r"[^\w.+-]+", "_", value, flags=re.ASCII)[:MOST_NAME]
        mark = "" if plain == value else f"~{sha256(value.encode()).hexdigest()[:6]}"
        parts.append(f"{name}={plain}{mark}")
    whole = ",".join(parts)
    if len(whole) <= MOST_FOLDER:
        return whole
    return f"{whole[:MOST_FOLDER]}~{sha256(whole.encode()).hexdigest()[:6]}"


def folder_of(
    values: Mapping[str, str], stage: Stage, known: Mapping[str, Flag], pictures: bool
) -> str:
    """A stage's folder below the run directory, by the values that its output depends on."""
    until = OF_EVERY_RUN[: OF_EVERY_RUN.index(stage) + 1]
    shaping = {n: v for n, v in values.items() if stage_of(known[n], pictures) in until}
    return f"{SWEEP_FOLDER}/{name_of(shaping)}" if shaping else "."


def stage_runs(run_dir: Path, cell: Cell, pictures: bool) -> Iterator[CellRun]:
    """What a cell needs, each stage in the folder of the values that its output depends on."""
    known, source = sweepable(), run_dir
    for stage, folder in zip(OF_EVERY_RUN, [*cell.sources, cell.folder], strict=True):
        own = {n: v for n, v in cell.values.items() if is_for(known[n], stage, pictures)}
        yield CellRun(stage=stage, source=source, folder=run_dir / folder, values=own)
        source = run_dir / folder


def is_for(flag: Flag, stage: Stage, pictures: bool) -> bool:
    """Whether a stage is given a swept flag: how to compute goes to all that take it."""
    if flag.declared.determines:
        return stage is stage_of(flag, pictures)
    return flag.is_of(stage)


def run_sweep(
    run_dir: Path,
    sweep: Sweep,
    run: Callable[[CellRun], tuple[int, str]],
    say: Callable[[str], None],
) -> int:
    """Run all cells; one that fails does not stop the others.

    Args:
        run: runs a stage, and returns its exit code and its error in words.

    Returns:
        The exit code of the first cell that failed, or of the stop that was asked for.
    """
    ended: dict[tuple[int, Path], tuple[int, str]] = {}
    for number, cell in enumerate(sweep.cells, 1):
        said = ", ".join(f"{name} {value}" for name, value in cell.values.items())
        say(f"cell {number} of {len(sweep.cells)}: {said}")
        for needed in stage_runs(run_dir, cell, sweep.of_pictures):
            key = (needed.stage.number, needed.folder)
            if key not in ended:
                ended[key] = run(needed)
            cell.exit_code, cell.error = ended[key]
            if cell.exit_code != 0:
                break
        write_sweep(run_dir, sweep)
        if cell.exit_code in {code for _, code in STOP_SIGNALS.values()}:
            return cell.exit_code
    return next((cell.exit_code for cell in sweep.cells if cell.exit_code), 0)


def write_sweep(run_dir: Path, sweep: Sweep) -> None:
    """Write `sweep.json`."""
    write_text_whole(run_dir / SWEEP_FILE, sweep.model_dump_json(indent=2) + "\n")


def read_sweep(run_dir: Path) -> Sweep | None:
    """A run directory's `sweep.json`; None where there is none.

    Raises:
        BadInputFileError: it is damaged, or names folders elsewhere.
    """
    path = run_dir / SWEEP_FILE
    try:
        sweep = Sweep.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, ValidationError) as error:
        reason = json.dumps(str(error).splitlines()[0])
        raise BadInputFileError(
            f"{path} is damaged ({reason}); remove it, or run the sweep again"
        ) from None
    for folder in {name for cell in sweep.cells for name in (cell.folder, *cell.sources)}:
        if Path(folder).is_absolute() or ".." in Path(folder).parts:
            raise BadInputFileError(f"{path} names a folder elsewhere ({folder}); remove it")
    return sweep
