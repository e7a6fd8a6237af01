"""Rows of files of any size, read one after the other, from any row on."""

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import fsspec

from common.errors import BadInputFileError, BadSettingError, StageError, in_one_line
from common.runs.prompts_file import check_header
from common.text_files import parse_json

ENDINGS = (".jsonl", ".ndjson", ".csv", ".parquet")
ROWS_AT_ONCE = 1024  # of Parquet
_BLANK = b" \t\r\n\v\f"


@dataclass(frozen=True)
class Row:
    """A row as its file has it."""

    number: int  # its line's, or in Parquet its own, from 1
    at: int  # where its file is read from to find it: a byte, in Parquet a row
    values: dict[str, Any] = field(default_factory=dict)
    error: str | None = None  # why it cannot be read


def find_files(place: str) -> list[str]:
    """The files of rows that a path or URL names: itself, or those of a folder, by name.

    Raises:
        BadInputFileError: it is not there, or cannot be reached.
        BadSettingError: it is none that is read.
    """
    with _reading(place):
        system, path = fsspec.core.url_to_fs(place)
        if not system.exists(path):
            raise BadInputFileError(f"{place} does not exist")
        found = sorted(system.find(path)) if system.isdir(path) else [path]
    files = [each for each in found if ending_of(each) in ENDINGS]
    if not files:
        raise BadSettingError(f"{place}: give a file of {', '.join(ENDINGS)}, or a folder of them")
    return [system.unstrip_protocol(each) for each in files]


def ending_of(file: str) -> str:
    """A file's ending, in small letters."""
    return PurePosixPath(file).suffix.lower()


def read_rows(file: str, at: int = 0, number: int = 1) -> Iterator[Row]:
    """The rows of a file, in their order; blank lines are none.

    Args:
        file: a URL.
        at, number: those of a row, to begin with it.

    Raises:
        BadInputFileError: the file cannot be read, or not on.
        BadSettingError: its header names no prompt.
    """
    readers = {".csv": _rows_of_table, ".parquet": _rows_of_parquet}
    read = readers.get(ending_of(file), _rows_of_lines)
    with _reading(file), fsspec.open(file, "rb") as opened:
        yield from read(opened, file, at, number)


@contextmanager
def _reading(place: str) -> Iterator[None]:
    try:
        yield
    except StageError:
        raise
    except Exception as error:  # of each kind of place its own
        raise BadInputFileError(f"{place} cannot be read: {in_one_line(error)}") from None


def _rows_of_lines(opened: Any, file: str, at: int, number: int) -> Iterator[Row]:
    opened.seek(at)
    for k, line in enumerate(opened, start=number):
        if text := line.strip(_BLANK):
            try:
                values = parse_json(text.decode("utf-8" if at else "utf-8-sig"))
                if not isinstance(values, dict):
                    raise ValueError("it is another value")
                yield Row(k, at, values)
            except UnicodeDecodeError:
                yield Row(k, at, error="is not UTF-8 text: save it as UTF-8")
            except ValueError as error:
                yield Row(k, at, error=f"is not a JSON object: {in_one_line(error)}")
        at += len(line)


class _Lines:
    """The lines of a table as text, and where the reader of them is."""

    def __init__(self, opened: Any, at: int, number: int) -> None:
        self._opened, self.at, self.number = opened, at, number
        self.is_text = True  # of the lines since it was set

    def __iter__(self) -> Iterator[str]:
        for line in self._opened:
            encoding = "utf-8" if self.at else "utf-8-sig"
            self.at, self.number = self.at + len(line), self.number + 1
            try:
                yield line.decode(encoding)
            except UnicodeDecodeError:
                self.is_text = False
                yield line.decode(encoding, "replace")


def _rows_of_table(opened: Any, file: str, at: int, number: int) -> Iterator[Row]:
    lines = _Lines(opened, 0, 1)
    try:
        header = [cell.strip().lower() for cell in next(csv.reader(iter(lines)), [])]
    except csv.Error as error:
        raise BadSettingError(f"{file}, line 1 is not CSV: {in_one_line(error)}") from None
    check_header(header, f"{file}, line 1")
    if at:
        opened.seek(at)
        lines = _Lines(opened, at, number)
    # A reader for each row, which else reads on after what it cannot read.
    texts = iter(lines)
    while True:
        began, lines.is_text = (lines.number, lines.at), True
        try:
            cells = next(csv.reader(texts, strict=True), None)
        except csv.Error as error:
            until = f" up to line {lines.number - 1}" if lines.number - 1 > began[0] else ""
            yield Row(*began, error=f"is not CSV{until}: {in_one_line(error)}")
            continue
        if cells is None:
            return
        cells = [cell.strip() for cell in cells]
        if not lines.is_text:
            yield Row(*began, error="is not UTF-8 text: save it as UTF-8")
        elif len(cells) > len(header):
            yield Row(
                *began,
                error=f"has {len(cells)} cells under a header of {len(header)}: put texts with "
                'commas in quotes (")',
            )
        elif any(cells):
            values = {name: cell for name, cell in zip(header, cells, strict=False) if cell}
            yield Row(*began, values)


def _rows_of_parquet(opened: Any, file: str, at: int, number: int) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(opened)
        groups, skipped = list[int](), 0
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            if not groups and skipped + rows <= at:
                skipped += rows
            else:
                groups.append(group)
        row = skipped
        for batch in table.iter_batches(ROWS_AT_ONCE, row_groups=groups):
            skipped = min(max(at - row, 0), batch.num_rows)
            row += skipped
            for values in batch.slice(skipped).to_pylist():
                there = {name: value for name, value in values.items() if value is not None}
                yield Row(row + 1, row, there)
                row += 1
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise BadInputFileError(f"{file} cannot be read: {in_one_line(error)}") from None
