"""Make one page of one or more runs: pictures, settings, lineage, and where the time went.

    python tools/report_page.py stage_outputs
    python tools/report_page.py runs/a runs/b runs/c --output comparison.html

The page is a single file that needs no network; that of many pictures has small ones of them in a
folder beside it, which are loaded as they come into view. Runs that differ in one or two settings,
a sweep's cells, or a run's prompts and seeds are laid out as a grid.
"""

import base64
import hashlib
import io
import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.stopping import stop_at_once_on_signals

if __name__ == "__main__":  # the other imports take a second
    stop_at_once_on_signals()

import jinja2
import typer

from common.commands import Debug, flag, make_command
from common.errors import BadInputFileError, shorten
from common.files import picture_files
from common.files.report import Report, Seconds
from common.files.run_files import DEFAULT_OUTPUT_DIR
from common.files.stage_table import IMAGE_LATENTS_FILE
from common.files.tensor_rows import names_as_given
from common.messages import say
from common.process import run_command
from common.runs.passes import passes_in
from common.runs.record import DAMAGED, FRESH, MISSING, STALE, FileRecord, RunRecord, read_run
from common.runs.run_index import find_ours, read_index
from common.runs.sweep import Cell, Sweep, read_sweep
from common.whole_files import remove_file, write_bytes_whole, write_text_whole

if TYPE_CHECKING:
    from PIL.Image import Image

PAGE_FILE = "report.html"
TEMPLATE_DIR = Path(__file__).resolve().parent / "templates"
PAGE = "What to show"
MOST_PIXELS = 1024  # a side of a picture in the page
MOST_WEBP_PIXELS = 16383
MOST_OPERATIONS = 12
MOST_INSIDE = 200  # pictures in the page itself; of more it has small ones beside it
MOST_SMALL_PIXELS = 256  # a side of these
SMALL_NAME = re.compile(r"[0-9a-f]{20}\.webp")
MOST_CAPTION = 120  # characters
MOST_TOLD = 8  # fresh pictures whose lineage is told
# What does not tell pictures apart, or says it twice.
NOT_AXES = (
    "prompts",
    "negative_prompts",
    "seeds",
    "unet_dtype",
    "unet_loras",
    "text_encoder_loras",
)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture in the page."""

    source: str  # data URI, or the path of a small one beside the page
    alt: str
    width: int
    height: int
    caption: str
    settings: dict[str, Any]


@dataclass(kw_only=True)
class Group:
    """Pictures beside what they began with."""

    inputs: list[Picture] = field(default_factory=list)  # a picture, and its mask; none
    pictures: list[Picture] = field(default_factory=list)


@dataclass(kw_only=True)
class RunView:
    """What the page shows of a run."""

    name: str
    error: str = ""  # of a failed cell
    values: dict[str, str] = field(default_factory=dict)  # of a sweep's cell
    groups: list[Group] = field(default_factory=list)
    settings: dict[str, str] = field(default_factory=dict)
    files: list[FileRecord] = field(default_factory=list)
    reports: dict[int, Report] = field(default_factory=dict)
    strip: Picture | None = None
    animation: Picture | None = None

    @property
    def told_files(self) -> list[FileRecord]:
        """The files that lineage shows: of many fresh pictures the first."""
        fresh = [file for file in self.files if file.settings and file.state == FRESH]
        left_out = {id(file) for file in fresh[MOST_TOLD:]}
        return [file for file in self.files if id(file) not in left_out]

    @property
    def files_left_out(self) -> int:
        """How many it does not show."""
        return len(self.files) - len(self.told_files)

    @property
    def pictures(self) -> list[Picture]:
        """All that the run made."""
        return [picture for group in self.groups for picture in group.pictures]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Pictures by what differs: a row for each value of one setting, a column for each of another.

    Attributes:
        title: the values of further settings that are shared here.
        cells: row by row; a cell holds pictures, or says why there are none.
    """

    title: str
    row_name: str
    rows: list[str]
    column_name: str
    columns: list[str]
    cells: list[list[tuple[list[Picture], str]]]


def main(
    run_dirs: Annotated[
        list[Path] | None, typer.Argument(metavar="RUN_DIR…", help="Run directories.")
    ] = None,
    output: Annotated[
        Path | None,
        flag("output", "FILE", PAGE, "The page. [report.html in the first run directory]"),
    ] = None,
    debug: Debug = False,
) -> None:
    """Make a page of one or more runs; a sweep's folder stands for all of its cells."""
    chosen = run_dirs or [Path(DEFAULT_OUTPUT_DIR)]
    say(f"page: {write_page(output or chosen[0] / PAGE_FILE, chosen)}")


def write_page(path: Path, run_dirs: Sequence[Path]) -> Path:
    """Write the page of some runs. Returns its path.

    Raises:
        BadInputFileError: a folder is not there, or holds no run.
    """
    runs: list[RunView] = []
    grids: list[Grid] = []
    place = Place.of(path, run_dirs)
    for run_dir in [each for folder in run_dirs for each in (folder, *passes_in(folder))]:
        if not run_dir.is_dir():
            raise BadInputFileError(f"{run_dir} is no folder: name a run directory")
        sweep = read_sweep(run_dir)
        if sweep is None:
            runs.append(view_run(run_dir, place))
            if not runs[-1].reports and all(file.state == MISSING for file in runs[-1].files):
                raise BadInputFileError(f"{run_dir} holds no run: name a run directory")
        else:
            cells = [view_cell(run_dir, cell, place) for cell in sweep.cells]
            grids += sweep_grids(sweep, cells)
            runs += cells
    if not grids and place.folder is None:
        grids = grids_of_differences(runs)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE_DIR),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.jinja").render(
        runs=runs,
        beside=place.folder is not None,
        grids=grids,
        bars=[stage_bars(run) for run in runs],
        plots=[step_plot(run) for run in runs],
        most_operations=MOST_OPERATIONS,
        parts=[name.replace("_", " ") for name in Seconds.model_fields],
    )
    write_text_whole(path, page)
    place.remove_others()
    return path


@dataclass
class Place:
    """Where a page's pictures are: inside, or as small ones in a folder beside it."""

    beside: Path  # the folder, used or not
    is_large: bool = True
    used: set[str] = field(default_factory=set)

    @property
    def folder(self) -> Path | None:
        """Where small ones are; None where pictures are inside."""
        return self.beside if self.is_large else None

    @classmethod
    def of(cls, page: Path, run_dirs: Sequence[Path]) -> "Place":
        """That of a page, by the number of pictures that it is to show."""
        folders = [each for run in run_dirs for each in (run, *passes_in(run), *_cells_of(run))]
        count = sum(len(find_ours(folder)) for folder in folders)
        return cls(page.with_name(f"{page.stem}_pictures"), count > MOST_INSIDE)

    def most(self, pixels: int) -> int:
        """Pixels of a side, of a picture that may have so many in the page."""
        return pixels if self.folder is None else min(pixels, MOST_SMALL_PIXELS)

    def put(self, content: bytes) -> str:
        """Keep a WebP file. Returns its address for the page."""
        if self.folder is None:
            return f"data:image/webp;base64,{base64.b64encode(content).decode()}"
        path = self.folder / f"{hashlib.sha256(content).hexdigest()[:20]}.webp"
        if not path.exists():
            write_bytes_whole(path, content)
        self.used.add(path.name)
        return f"{self.folder.name}/{path.name}"

    def remove_others(self) -> None:
        """Remove what an earlier page had in the folder."""
        for path in self.beside.iterdir() if self.beside.is_dir() else ():
            if SMALL_NAME.fullmatch(path.name) and path.name not in self.used:
                remove_file(path)


INSIDE = Place(Path(), is_large=False)


def _cells_of(run_dir: Path) -> list[Path]:
    sweep = read_sweep(run_dir)
    return [] if sweep is None else [run_dir / cell.folder for cell in sweep.cells]


def view_cell(run_dir: Path, cell: Cell, place: Place) -> RunView:
    """What the page shows of a sweep's cell; of one that failed, that it did."""
    folder = run_dir / cell.folder
    if cell.exit_code == 0:
        view = view_run(folder, place, [run_dir / source for source in cell.sources])
    else:
        error = "it was not run" if cell.exit_code is None else f"failed: {cell.error}"
        view = RunView(name=str(folder), error=error)
    view.name = ", ".join(f"{name} {value}" for name, value in cell.values.items())
    view.values = cell.values
    return view


def view_run(run_dir: Path, place: Place = INSIDE, sources: Sequence[Path] = ()) -> RunView:
    """What the page shows of a run directory, whose inputs may be in others."""
    run = read_run(run_dir, sources)
    view = RunView(name=str(run_dir), files=run.files, reports=run.reports, error=run.problem)
    prompt_of = [0]
    if run.config is not None:
        view.settings = as_texts(json.loads(run.config.model_dump_json()))
        prompt_of = run.config.prompt_of_images()
    view.groups = input_groups(run, [run_dir, *sources]) or [Group()]
    places = {line["file"]: line.get("index") for line in read_index(run_dir)}
    shown: dict[int, Picture] = {}
    for file in run.of_stage(3):
        if not file.settings:
            continue
        path = run_dir / file.name
        if file.name == picture_files.TRAJECTORY_STRIP:
            view.strip = load_picture(path, file, "the latents of some steps, decoded")
        elif file.name == picture_files.TRAJECTORY_ANIMATION:
            view.animation = load_picture(path, file, "the same, as an animation", whole=True)
        elif "prompt" in file.settings:
            at = places.get(file.name)
            picture = load_picture(path, file, caption_of(file.settings), place)
            shown[at if isinstance(at, int) and at not in shown else len(shown)] = picture
    for index, picture in sorted(shown.items()):
        prompt = prompt_of[min(index, len(prompt_of) - 1)]
        group = view.groups[min(prompt, len(view.groups) - 1)]
        group.pictures.append(picture)
    return view


def input_groups(run: RunRecord, folders: Sequence[Path]) -> list[Group]:
    """A group for each picture that a run begins with, no results in it yet."""
    from PIL import Image
    from safetensors import safe_open

    file = run.file(IMAGE_LATENTS_FILE)
    has_pictures = run.config is None or run.config.has_pictures
    if not has_pictures or file is None or file.state in (MISSING, DAMAGED, STALE):
        return []
    path = next(folder / file.name for folder in folders if (folder / file.name).exists())
    shown = []
    with safe_open(path, framework="numpy") as tensors:
        names = [*tensors.keys()]
        captions = ("what it begins with", "its mask")
        for name, words in zip(names_as_given(names), captions, strict=True):
            if name in names:
                arrays = tensors.get_tensor(name)
                shown.append([to_picture(Image.fromarray(array), words) for array in arrays])
    return [Group(inputs=list(each)) for each in zip(*shown, strict=True)]


def to_picture(
    image: "Image",
    caption: str,
    settings: dict[str, Any] | None = None,
    *,
    most: int = MOST_PIXELS,
    content: bytes | None = None,
    place: Place = INSIDE,
) -> Picture:
    """An image for the page, as WebP without its metadata.

    Args:
        most: pixels a side.
        content: of a WebP file that takes its place.
    """
    width, height = image.size
    if content is None:
        small, buffer = image.convert("RGB"), io.BytesIO()
        small.thumbnail((place.most(most), place.most(most)))
        small.save(buffer, format="WEBP", quality=92)
        content = buffer.getvalue()
    return Picture(
        source=place.put(content),
        alt=shorten(caption, MOST_CAPTION),
        width=width,
        height=height,
        caption=shorten(caption, MOST_CAPTION),
        settings=settings or {},
    )


def load_picture(
    path: Path, file: FileRecord, caption: str, place: Place = INSIDE, *, whole: bool = False
) -> Picture:
    """A picture for the page, as WebP without its metadata; `whole` keeps the file as it is."""
    from PIL import Image

    most = MOST_WEBP_PIXELS if "trajectory" in path.name else MOST_PIXELS
    content = path.read_bytes() if whole else None
    with Image.open(path) as image:
        return to_picture(image, caption, file.settings, most=most, content=content, place=place)


def caption_of(settings: dict[str, Any]) -> str:
    """What a picture is of."""
    return f"{settings.get('prompt', '')}, seed {settings.get('seed', '?')}"


def as_texts(settings: dict[str, Any]) -> dict[str, str]:
    """Settings as texts to show; those that are not set are left out."""
    return {name: to_text(value) for name, value in settings.items() if value not in (None, [], {})}


def to_text(value: Any) -> str:
    """A setting's value as text."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def sweep_grids(sweep: Sweep, cells: Sequence[RunView]) -> list[Grid]:
    """A sweep's cells: the first setting down, the second across, a grid for each of the others."""
    names = list(sweep.axes)
    down, across = names[0], names[1] if len(names) > 1 else ""
    titles: dict[str, list[RunView]] = {}
    for cell in cells:
        title = ", ".join(f"{name} {cell.values[name]}" for name in names[2:])
        titles.setdefault(title, []).append(cell)
    return [
        Grid(
            title=title,
            row_name=down,
            rows=sweep.axes[down],
            column_name=across,
            columns=sweep.axes[across] if across else [""],
            cells=[
                [
                    _cell_of(chosen, {down: row} | ({across: column} if across else {}))
                    for column in (sweep.axes[across] if across else [""])
                ]
                for row in sweep.axes[down]
            ],
        )
        for title, chosen in titles.items()
    ]


def _cell_of(cells: Iterable[RunView], values: dict[str, str]) -> tuple[list[Picture], str]:
    cell = next(c for c in cells if values.items() <= c.values.items())
    return cell.pictures, cell.error


def grids_of_differences(runs: Sequence[RunView]) -> list[Grid]:
    """One grid of all pictures over the one or two settings in which they differ, if it is full."""
    shown = [picture for run in runs for picture in run.pictures]
    if len(shown) < 2:
        return []
    names = {name for picture in shown for name in picture.settings if name not in NOT_AXES}
    values = {
        name: list(dict.fromkeys(to_text(picture.settings.get(name)) for picture in shown))
        for name in sorted(names, key=_as_axis)
    }
    # What says the same as another setting, such as prompt_2, is no axis of its own.
    axes: dict[str, list[str]] = {}
    partitions: set[tuple[int, ...]] = set()
    for name, found in values.items():
        partition = tuple(found.index(to_text(picture.settings.get(name))) for picture in shown)
        if len(found) > 1 and partition not in partitions:
            partitions.add(partition)
            axes[name] = found
    if len(axes) == 2 and len(partitions) == 2:
        down, across = axes
    elif len(axes) == 1:
        (down,), across = axes, ""
    else:
        return []
    rows, columns = axes[down], axes[across] if across else [""]
    cells: list[list[tuple[list[Picture], str]]] = []
    for row in rows:
        cells.append([])
        for column in columns:
            here = [
                picture
                for picture in shown
                if to_text(picture.settings.get(down)) == row
                and (not across or to_text(picture.settings.get(across)) == column)
            ]
            cells[-1].append((here, "" if here else "no picture"))
    return [
        Grid(
            title="",
            row_name=down,
            rows=rows,
            column_name=across,
            columns=columns,
            cells=cells,
        )
    ]


def _as_axis(name: str) -> tuple[int, str]:
    """Prompts go down, seeds and the rest across."""
    order = ("prompt", "scheduler", "num_inference_steps", "guidance_scale", "seed")
    return (order.index(name) if name in order else len(order), name)


def stage_bars(run: RunView) -> list[dict[str, Any]]:
    """For each stage the parts of its time, as shares of the run's longest stage."""
    longest = max((report.wall_seconds for report in run.reports.values()), default=0.0)
    bars = []
    for stage, report in sorted(run.reports.items()):
        parts = {
            name.replace("_", " "): seconds
            for name, seconds in report.seconds.model_dump().items()
            if seconds > 0
        }
        bars.append(
            {
                "stage": stage,
                "wall": report.wall_seconds,
                "parts": [
                    {"name": name, "seconds": seconds, "share": 100 * seconds / longest}
                    for name, seconds in parts.items()
                ],
                "report": report,
            }
        )
    return bars


def step_plot(run: RunView) -> dict[str, Any] | None:
    """The seconds of stage 2's steps as points of a drawing 600 wide and 120 high."""
    report = run.reports.get(2)
    if report is None or not report.step_seconds or len(report.step_seconds) < 2:
        return None
    seconds = report.step_seconds
    most = max(seconds)
    points = [
        (round(600 * i / (len(seconds) - 1), 1), round(120 - 110 * second / most, 1))
        for i, second in enumerate(seconds)
    ]
    return {
        "points": points,
        "most": 1e3 * most,
        "median": 1e3 * sorted(seconds)[len(seconds) // 2],
        "count": len(seconds),
    }


if __name__ == "__main__":
    run_command(make_command(main))
