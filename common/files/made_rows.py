"""The rows of a file while a stage makes them: where each is until all of them are written."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from common.files import artifacts
from common.files.artifacts import MADE_BY, Row
from common.files.kept_progress import UNTOLD, KeptRow, Making, Progress
from common.files.recipe import Recipe
from common.files.row_reader import ROWS_AT_ONCE, read_rows
from common.files.rows import Rows
from common.files.rows_to_come import announce
from common.files.tensor_writer import NO_HASH, written_in_parts

if TYPE_CHECKING:
    import torch

    Tensors = dict[str, torch.Tensor]


Announced = tuple[Recipe, dict[str, Any]]  # of a file: its recipe, and where it comes from


class MadeRows:
    """Rows in an earlier file, in groups that are kept, or in memory; the others are missing."""

    def __init__(
        self,
        path: Path,
        rows: Rows,
        progress: Progress | None = None,
        announced: Announced | None = None,
    ) -> None:
        """
        Args:
            path: of the file that they are for.
            rows: all of them, and those that an earlier file has.
            progress: where groups are kept; None: in memory.
            announced: told to who reads groups as they are kept, before the first of them.
        """
        self._announced = announced
        self.path, self.rows, self.progress = path, rows, progress
        self.count = len(rows.fingerprints)
        known = {} if progress is None else progress.find_rows()
        fingerprints = enumerate(rows.fingerprints)
        # What the earlier file has is read from there.
        self._kept = {
            row: known[each]
            for row, each in fingerprints
            if each in known and row not in rows.places
        }
        self._held: dict[int, Tensors] = {}
        self.held_bytes = 0
        self._making: dict[int, Making] = {}

    @classmethod
    def numbered(cls, count: int, progress: Progress | None = None) -> Self:
        """Rows that no recipe determines, and that no file is to have."""
        fingerprints = [str(row) for row in range(count)]
        return cls(Path("rows"), Rows(recipes=[], fingerprints=fingerprints), progress)

    @property
    def kept(self) -> int:
        """How many an earlier run kept, or this one."""
        return len(self._kept)

    @property
    def missing(self) -> list[int]:
        """Those that are to be made."""
        there = self.rows.places.keys() | self._kept.keys() | self._held.keys()
        return [row for row in range(self.count) if row not in there]

    def making(self, row: int) -> Making:
        """How a row was made, as far as that is known."""
        if row in self.rows.places:
            return self.rows.making(row)
        if row in self._kept:
            return self._kept[row].making
        return self._making.get(row, UNTOLD)

    def group(self, rows: Sequence[int]) -> list[str]:
        """What a group of rows is known by in the progress that is kept."""
        return [self.rows.fingerprints[row] for row in rows]

    def put(self, rows: Sequence[int], tensors: "Tensors", making: Making, *, keep: bool) -> None:
        """Take rows that were made, [N, …] each.

        Args:
            keep: until all are made, for a run that goes on; else they are held in memory.

        Raises:
            NotFiniteError: a row holds an infinity or a not-a-number.
        """
        artifacts.check_finite(tensors, self.path, "was not written")
        if self.progress is not None and keep:
            if self._announced is not None:
                announce(self.progress, *self._announced, self.rows)
                self._announced = None
            path = self.progress.save_group(self.group(rows), tensors, **making._asdict())
            self._kept |= {row: KeptRow(path, k, making) for k, row in enumerate(rows)}
            return
        self.held_bytes += sum(tensor.nbytes for tensor in tensors.values())
        for k, row in enumerate(rows):
            self._held[row] = {name: tensor[k : k + 1] for name, tensor in tensors.items()}
            self._making[row] = making

    def keep_held(self, making: Making) -> None:
        """Keep as one group what is held in memory, all of it made in the same way."""
        import torch

        rows, held = [*self._held], [*self._held.values()]
        if not rows:
            return
        self._held, self.held_bytes = {}, 0
        tensors = {name: torch.cat([each[name] for each in held]) for name in held[0]}
        self.put(rows, tensors, making, keep=True)

    def read(self, rows: Sequence[int], name: str) -> "torch.Tensor":
        """A tensor's rows of one size, [N, …]."""
        import torch

        parts = []
        for (path, ending), group in groupby(map(self._place, rows), lambda place: place[:2]):
            places = [place for *_, place in group]
            if path is None:
                parts += [self._held[row][name] for row in places]
            else:
                whole = f"{name}{ending}"
                parts.append(read_rows(path, places, [whole])[whole])
        return torch.cat(parts)

    def _place(self, row: int) -> tuple[Path | None, str, int]:
        """The file that has a row, the ending of its tensors' names there, and where in them.

        None and the row itself: in memory.
        """
        if row in self.rows.places and self.rows.earlier is not None:
            place = self.rows.earlier_places[self.rows.places[row]]
            return self.rows.earlier.path, place.ending, place.row
        if row in self._kept:
            return self._kept[row].path, "", self._kept[row].place
        return None, "", row

    def write(
        self, names: Sequence[str], recipe: Recipe, provenance: dict[str, Any]
    ) -> dict[str, list[int]]:
        """Write the file once none is missing. Returns its tensors' shapes.

        Args:
            names: of the tensors that it is to have.
        """
        known: list[dict[str, Any]] = []
        rows, by_ending = [], dict[str, list[int]]()
        for row, fingerprint in enumerate(self.rows.fingerprints):
            seconds, made_by = self.making(row)
            if made_by and made_by not in known:
                known.append(made_by)
            index = known.index(made_by) if made_by else None
            ending = self.rows.endings[row]
            rows.append(Row(fingerprint, NO_HASH, seconds, index, ending))
            by_ending.setdefault(ending, []).append(row)

        def read(some: Sequence[int]) -> "Tensors":
            return {name: self.read(some, name) for name in names}

        provenance = {**provenance, MADE_BY: known} if known else provenance
        with written_in_parts(self.path, recipe, provenance, rows) as written:
            written.lay_out({ending: read(own[:1]) for ending, own in by_ending.items()})
            for ending, own in by_ending.items():
                for first in range(0, len(own), ROWS_AT_ONCE):
                    written.put(read(own[first : first + ROWS_AT_ONCE]), ending)
        return written.shapes
