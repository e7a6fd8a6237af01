"""`images.jsonl`: a line for each picture of a run; the same as CSV or Parquet where asked."""

import csv
import io
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from common.errors import BadInputFileError, BadSettingError, UnfitEnvironmentError
from common.files.picture_files import OUR_NAME, find_pictures, read_picture_record
from common.files.recipe import to_json
from common.text_files import parse_json
from common.whole_files import remove_file, replace_whole, write_text_whole

INDEX_FILE = "images.jsonl"
Format = Literal["csv", "parquet"]
OTHER_FILES: dict[Format, str] = {"csv": "images.csv", "parquet": "images.parquet"}
SECONDS_BETWEEN_WRITES = 2.0  # of one that grows: it is written whole
Line = dict[str, Any]


def read_index(run_dir: Path) -> list[Line]:
    """The lines of a run's index; none where there is none, or it is damaged."""
    try:
        text = (run_dir / INDEX_FILE).read_text(encoding="utf-8")
        # Not str.splitlines, for which U+2028 within a prompt ends a line.
        lines = [parse_json(line) for line in text.removesuffix("\n").split("\n")]
    except (OSError, ValueError):
        return []
    texts = ("file", "fingerprint")
    named = [
        line
        for line in lines
        if isinstance(line, dict) and all(isinstance(line.get(name), str) for name in texts)
    ]
    return named if len(named) == len(lines) else []


def write_index(run_dir: Path, lines: Iterable[Line]) -> None:
    """Write a run's index, whole or not at all."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_text_whole(run_dir / INDEX_FILE, text)


def find_ours(run_dir: Path) -> list[Path]:
    """The pictures of a run directory that have names of ours, or those of its index, in order."""
    listed = {line["file"] for line in read_index(run_dir)}
    pictures = find_pictures(run_dir)
    return [path for path in pictures if OUR_NAME.fullmatch(path.name) or path.name in listed]


def is_ours(path: Path) -> bool:
    """Whether a picture holds a record of ours."""
    try:
        return read_picture_record(path) is not None
    except BadInputFileError:
        return True  # of an older format


def refuse_foreign(run_dir: Path, names: Iterable[str]) -> None:
    """Raise `BadSettingError` where a file of the user's own has the name of one of our pictures.

    Args:
        names: of the run's pictures.
    """
    listed = {line["file"] for line in read_index(run_dir)}
    for name in names:
        path = run_dir / name
        known = OUR_NAME.fullmatch(name) is not None or name in listed
        if not known and path.exists() and not is_ours(path):
            raise BadSettingError(
                f"{path} is there and no picture of ours, and a picture of the run would take its "
                "place: move it, or choose other ids, --name_template or --output_dir"
            )


class RunIndex:
    """The index of a run whose pictures are being made."""

    def __init__(self, run_dir: Path, lines: Sequence[Line], other: Format | None) -> None:
        """
        Args:
            lines: of all images, but for what only their making tells.
            other: in which the list is written besides.
        """
        self._run_dir, self._lines, self._other = run_dir, lines, other
        before = read_index(run_dir)
        # Pictures of an earlier run are listed until they are replaced or removed.
        self._earlier = {line["file"]: line for line in before}
        self._seconds = {line.get("fingerprint"): line.get("seconds") for line in before}
        self._done: set[int] = set()
        self._written_at = time.monotonic()

    def add(self, row: int, seconds: float | None = None) -> None:
        """Count an image as done.

        Args:
            seconds: of its making; None: as an earlier index has it.
        """
        self._done.add(row)
        self._earlier.pop(self._lines[row]["file"], None)
        if seconds is not None:
            self._seconds[self._lines[row]["fingerprint"]] = round(seconds, 4)

    def write_if_due(self) -> None:
        """Write it, where the last time was some seconds ago."""
        if time.monotonic() - self._written_at >= SECONDS_BETWEEN_WRITES:
            self.write_now()

    def write(self) -> None:
        """Write it of this run alone, in all formats that are asked for; remove the others."""
        self._earlier = {}
        self.write_now()
        for kind, name in OTHER_FILES.items():
            if kind != self._other:
                remove_file(self._run_dir / name)
        if self._other == "csv":
            write_text_whole(self._run_dir / OTHER_FILES["csv"], to_csv(self._finished()))
        elif self._other == "parquet":
            write_parquet(self._run_dir / OTHER_FILES["parquet"], self._finished())

    def write_now(self) -> None:
        """Write it as far as it is."""
        earlier = [line | {"earlier": True} for line in self._earlier.values()]
        lines = [*self._finished(), *earlier]
        write_index(self._run_dir, lines)
        self._written_at = time.monotonic()

    def _finished(self) -> list[Line]:
        return [
            line | {"seconds": self._seconds.get(line["fingerprint"])}
            for row, line in enumerate(self._lines)
            if row in self._done
        ]


def why_index_stale(run_dir: Path, lines: Sequence[Line], other: Format | None) -> str | None:
    """Why an index has to be written anew, or None."""
    if other == "parquet":
        require_parquet()
    found = [{k: v for k, v in line.items() if k != "seconds"} for line in read_index(run_dir)]
    if found != parse_json(to_json(list(lines))):
        there = (run_dir / INDEX_FILE).exists()
        return f"{INDEX_FILE} {'is of other pictures' if there else 'is not there'}"
    if other is not None and not (run_dir / OTHER_FILES[other]).exists():
        return f"{OTHER_FILES[other]} is not there"
    return None


def to_csv(lines: Sequence[Line]) -> str:
    """Lines as CSV with a header; lists and objects as JSON."""
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, columns_of(lines))
    writer.writeheader()
    writer.writerows({name: _plain(value) for name, value in line.items()} for line in lines)
    return file.getvalue()


def write_parquet(path: Path, lines: Sequence[Line]) -> None:
    """Lines as a Parquet file; lists and objects as JSON."""
    require_parquet()
    import pyarrow
    from pyarrow import parquet

    columns = {name: [_plain(line.get(name)) for line in lines] for name in columns_of(lines)}
    with replace_whole(path) as temporary:
        parquet.write_table(pyarrow.table(columns), temporary)


def require_parquet() -> None:
    """Raise `UnfitEnvironmentError` where Parquet cannot be written."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise UnfitEnvironmentError(
            "--index parquet needs a package that is not installed: pip install pyarrow, or use csv"
        ) from None


def columns_of(lines: Sequence[Line]) -> list[str]:
    """The names of all values, in the order in which they are met."""
    return [*dict.fromkeys(name for line in lines for name in line)]


def _plain(value: Any) -> Any:
    return to_json(value) if isinstance(value, list | dict) else value


def differing(settings: Sequence[Mapping[str, Any]]) -> set[str]:
    """The names of settings that are not the same for all images."""
    first = settings[0]
    return {
        name
        for own in settings[1:]
        for name in own.keys() | first.keys()
        if own.get(name) != first.get(name)
    }
