"""A file's rows that another process makes, read as groups of them are kept."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from common.errors import BadInputFileError
from common.files import artifacts
from common.files.artifacts import MADE_BY, Header, Row, make_header
from common.files.kept_progress import Making, Progress, progress_paths
from common.files.recipe import Recipe
from common.files.rows import Rows
from common.files.run_lock import process_of_stage
from common.files.stage_table import Stage
from common.files.tensor_writer import NO_HASH
from common.text_files import parse_json, read_text
from common.whole_files import write_text_whole

if TYPE_CHECKING:
    import torch

TO_COME_FILE = "to_come.json"  # among what is kept
PROCESS, FACTS, HEADER = "process", "facts", "header"


def announce(progress: Progress, recipe: Recipe, provenance: Mapping[str, Any], rows: Rows) -> None:
    """Say what file the groups are for that are being kept.

    Args:
        recipe: of the file, and where it comes from.
        rows: of it.
    """
    each = zip(rows.fingerprints, rows.endings, strict=True)
    own = [Row(fingerprint, NO_HASH, ending=ending) for fingerprint, ending in each]
    header = make_header(recipe, dict(provenance), NO_HASH, own).to_json()
    content = {PROCESS: os.getpid(), FACTS: progress.facts, HEADER: header}
    write_text_whole(progress.folder / TO_COME_FILE, json.dumps(content))


class ComingRows(NamedTuple):
    """Rows of a group that was finished."""

    rows: list[int]  # of the file; those that are the same stand here each
    places: list[int]  # of each, in the tensors
    tensors: "dict[str, torch.Tensor]"
    data_sha256: list[str]  # of each row, as the file will have it
    making: Making


class RowsToCome:
    """The rows that the process makes which runs a stage now."""

    def __init__(self, run_dir: Path, stage: Stage) -> None:
        self.path = run_dir / stage.writes[0]
        self.header: Header | None = None  # of the file to come, once that is said
        self._stage, self._run_dir, self._seen = stage, run_dir, set[Path]()
        self._rows: dict[str, list[int]] = {}

    def look(self) -> bool:
        """Whether it is said by now what is to come."""
        if self.header is not None:
            return True
        folder, _ = progress_paths(self._run_dir, self._stage.number)
        try:
            said = parse_json(read_text(folder / TO_COME_FILE))
            if said[PROCESS] != process_of_stage(self._run_dir):
                return False  # an earlier one's
            header = Header.from_json(said[HEADER], self.path)
            self._progress = Progress(self._run_dir, self._stage.number, dict(said[FACTS]))
        except (OSError, ValueError, LookupError, TypeError, BadInputFileError):
            return False
        for number, row in enumerate(header.rows):
            self._rows.setdefault(row.fingerprint, []).append(number)
        self.header = header
        return True

    def known_rows(self) -> dict[int, str]:
        """The rows that an earlier file has, each with its checksum."""
        try:
            earlier = artifacts.inspect(self.path, verify=False).header
        except BadInputFileError:
            return {}
        rows = [] if earlier is None else earlier.rows
        return {
            row: known.data_sha256
            for known in rows
            for row in self._rows.get(known.fingerprint, ())
        }

    def new_groups(self, name: str) -> Iterator[ComingRows]:
        """The groups that were finished since the last time.

        Args:
            name: of the file's tensor.
        """
        if not self.look():
            return
        for group, tensors in self._progress.new_groups(self._seen):
            own = {name: tensors[name]}
            found = [
                (row, place)
                for place, fingerprint in enumerate(group.fingerprints)
                for row in self._rows.get(fingerprint, ())
            ]
            places = [place for _, place in found]
            hashes = [
                artifacts.hash_tensors({name: tensors[name][place : place + 1]}) for place in places
            ]
            rows = [row for row, _ in found]
            yield ComingRows(rows, places, own, hashes, group.making)

    def ending(self, row: int) -> str:
        """Of a row's tensors in the file to come."""
        assert self.header is not None
        return self.header.rows[row].ending

    def note(self, row: int, making: Making) -> None:
        """Let the header of the file to come say how a row was made."""
        assert self.header is not None
        known = self.header.provenance.setdefault(MADE_BY, [])
        if making.made_by not in known:
            known.append(making.made_by)
        self.header.rows[row] = self.header.rows[row]._replace(
            seconds=making.seconds, made_by=known.index(making.made_by)
        )

    def refuse_unfinished(self) -> None:
        """Raise `BadInputFileError` where the process ended and the file is not there."""
        if self.header is None:
            return
        try:
            found = artifacts.inspect(self.path, verify=False).header
        except BadInputFileError:
            found = None
        if found is None or found.fingerprint != self.header.fingerprint:
            raise BadInputFileError(
                f"{self._stage.name} ended before {self.path} was written: the same command goes "
                "on from what is kept"
            )
