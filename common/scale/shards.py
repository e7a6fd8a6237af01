"""Shards of a long list: rows that follow each other, and what their pictures depend on."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from common.errors import BadSettingError, StageError, UnfitEnvironmentError, in_one_line
from common.files.recipe import to_json
from common.runs.generation import RunSettings
from common.runs.prompts_file import prompt_of
from common.runs.seeds import images_of, seeds_of
from common.scale.row_files import Row, read_rows

INPUTS = ("image", "mask_image")
# What a row says for itself in a shard's list, since flags would count from the shard's begin.
OF_ROWS = ("seed", "same_seed", "seed_offset", "num_images_per_prompt")


class Failure(NamedTuple):
    """A row of which there are no pictures."""

    row: int  # among all, from 0
    where: str  # file and line
    error: str
    exit_code: int  # that a run of it alone would have


class Line(NamedTuple):
    """A row as a line of its shard's list of prompts, or why it is none."""

    row: int
    where: str
    images: int  # that its seeds count; of one that cannot be read as many as a row has
    text: str  # JSON
    own_id: str | None = None  # as its file has it
    inputs: tuple[str, ...] = ()  # of `INPUTS` that it has
    files: tuple[str, ...] = ()  # that it names
    failure: Failure | None = None

    def of_list(self, inputs: tuple[str, ...]) -> Self:
        """The row in a list whose first row has some inputs: a run has those of all, or of none."""
        if self.failure is not None or self.inputs == inputs:
            return self
        error = (
            f"{self.where} has {' and '.join(self.inputs) or 'no image'}, and the list's first row "
            f"has {' and '.join(inputs) or 'none'}: move it to another list"
        )
        failure = Failure(self.row, self.where, error, BadSettingError.exit_code)
        return self._replace(text="", failure=failure)


@dataclass(frozen=True)
class Part:
    """Rows of one file."""

    file: str
    at: int  # the first one's, as `read_rows` takes it
    number: int
    rows: int


@dataclass(frozen=True)
class Shard:
    """Rows that are one run directory."""

    first_row: int  # among all, from 0
    first_image: int
    rows: int
    images: int
    inputs: tuple[str, ...]  # that all of its rows have: image, mask_image, or none
    parts: tuple[Part, ...]
    of_rows: str  # a hash of these as they were read
    fingerprint: str  # of all that its pictures depend on

    @property
    def name(self) -> str:
        return f"{self.first_row:09d}-{self.fingerprint[:16]}"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        values = json.loads(text)
        parts = tuple(Part(**part) for part in values["parts"])
        return cls(**values | {"parts": parts, "inputs": tuple(values["inputs"])})

    def lines(self, settings: RunSettings) -> list[Line]:
        """Its rows, read again.

        Raises:
            UnfitEnvironmentError: they are not those that it was planned of.
        """
        lines, digest = list[Line](), hashlib.sha256()
        row, image = self.first_row, self.first_image
        for part in self.parts:
            found = read_rows(part.file, part.at, part.number)
            for each, _ in zip(found, range(part.rows), strict=False):
                line = line_of(each, part.file, row, image, settings).of_list(self.inputs)
                digest.update(_said_of(each, line))
                lines.append(line)
                row, image = row + 1, image + line.images
        if digest.hexdigest() != self.of_rows:
            raise UnfitEnvironmentError(
                f"{self.parts[0].file} is not what it was when the list was read: give the same "
                "command again, or make the same file readable on all nodes"
            )
        return lines


def line_of(found: Row, file: str, row: int, image: int, settings: RunSettings) -> Line:
    """A row as the list of its shard has it: with its own seeds, and an id that names its files.

    Args:
        row, image: how many rows and images come before it.
        settings: the run's.
    """
    where = f"{file}, line {found.number}"
    try:
        if found.error is not None:
            raise BadSettingError(f"{where} {found.error}")
        prompt = prompt_of(dict(found.values), settings, where)
        (images,) = images_of([prompt], settings.num_images_per_prompt)
        seeds = seeds_of([prompt], [images], settings, before=image)
        left_out = (*OF_ROWS, "seeds")
        own = {name: value for name, value in found.values.items() if name not in left_out}
        own["id"] = f"{row:09d}"
        own |= {"seed": seeds} if images > 1 else {"seed": seeds[0], "num_images_per_prompt": 1}
        text = _json_of(own, where)
    except StageError as error:
        failure = Failure(row, where, str(error), error.exit_code)
        return Line(row, where, settings.num_images_per_prompt, "", failure=failure)
    inputs = tuple(name for name in INPUTS if getattr(prompt, name) is not None)
    files = [getattr(prompt, name) for name in inputs]
    files += [lora["file"] for lora in prompt.settings.get("loras") or ()]
    return Line(row, where, images, text, prompt.id, inputs, tuple(files))


def _json_of(values: dict[str, Any], where: str) -> str:
    try:
        text = json.dumps(values, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (TypeError, ValueError) as error:
        raise BadSettingError(
            f"{where} has a value that a list in JSON cannot have ({in_one_line(error)})"
        ) from None
    return text


def _said_of(found: Row, line: Line) -> bytes:
    """All that a row says, for a hash."""
    said = [line.own_id, line.text] if line.text else [repr(found.values), found.error]
    return f"{to_json(said)}\n".encode(errors="backslashreplace")


def plan_shards(
    files: Sequence[str],
    settings: RunSettings,
    *,
    images: int,
    whole: str,
    content_of: Callable[[str], Any],
) -> Iterator[Shard]:
    """Divide the rows of files, each of which is read once.

    Args:
        images: of a shard; more where its last row has several.
        whole: what the pictures of all rows depend on.
        content_of: what a file that a row names is, such as its size and time.

    Raises:
        BadInputFileError: a file cannot be read.
    """
    row = image = 0
    inputs: tuple[str, ...] | None = None
    planned = _Planned(row, image, whole)
    for file in files:
        planned.begin(file)
        for found in read_rows(file):
            line = line_of(found, file, row, image, settings)
            if inputs is None and line.failure is None:
                inputs = line.inputs
            line = line.of_list(inputs or ())
            planned.add(found, line, [content_of(each) for each in line.files])
            row, image = row + 1, image + line.images
            if planned.images >= images:
                yield planned.shard(inputs or ())
                planned = _Planned(row, image, whole)
                planned.begin(file)
    if planned.rows:
        yield planned.shard(inputs or ())


class _Planned:
    """A shard that grows."""

    def __init__(self, first_row: int, first_image: int, whole: str) -> None:
        self._first_row, self._first_image = first_row, first_image
        self._of_rows, self._of_files = hashlib.sha256(), hashlib.sha256(f"{whole}\n".encode())
        self._parts: list[Part] = []
        self._file = ""
        self.rows = self.images = 0

    def begin(self, file: str) -> None:
        self._file = file

    def add(self, found: Row, line: Line, of_files: list[Any]) -> None:
        self._of_rows.update(_said_of(found, line))
        self._of_files.update(f"{to_json(of_files)}\n".encode(errors="backslashreplace"))
        last = self._parts[-1] if self._parts else None
        if last is None or last.file != self._file:
            last = Part(self._file, found.at, found.number, 0)
            self._parts.append(last)
        self._parts[-1] = Part(last.file, last.at, last.number, last.rows + 1)
        self.rows, self.images = self.rows + 1, self.images + line.images

    def shard(self, inputs: tuple[str, ...]) -> Shard:
        of_rows = self._of_rows.hexdigest()
        self._of_files.update(of_rows.encode())
        return Shard(
            self._first_row,
            self._first_image,
            self.rows,
            self.images,
            inputs,
            tuple(self._parts),
            of_rows,
            self._of_files.hexdigest(),
        )


def about_file(name: str) -> list[Any]:
    """How large a file that a row names is, and when it was changed."""
    path = Path(name).expanduser()
    try:
        about = path.stat()
    except OSError:
        return [name]
    return [name, about.st_size, about.st_mtime_ns]
