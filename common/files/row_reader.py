"""Files that stages exchange, read whole, or by rows when these are computed with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import BadInputFileError
from common.files import artifacts
from common.files.artifacts import Artifact
from common.files.row_places import layouts_by_ending, row_places
from common.files.tensor_rows import known_names

if TYPE_CHECKING:
    import torch

ROWS_AT_ONCE = 64  # of those that are only looked at


def load_tensors(artifact: Artifact, warn: Callable[[str], None]) -> "dict[str, torch.Tensor]":
    """Load an inspected file.

    Args:
        warn: is told what could not be verified of a file without our header.

    Raises:
        BadInputFileError: the file cannot be read.
        NotFiniteError: a tensor holds an infinity or a not-a-number.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = artifact.path
    _warn_of_elsewhere(artifact, warn)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise BadInputFileError(
            f"{path} is damaged ({error}); {artifacts.how_to_remake(path)}"
        ) from None
    artifacts.check_finite(tensors, path, "cannot be used")
    return tensors


def read_rows(
    path: Path, places: Sequence[int], names: Sequence[str] | None = None
) -> "dict[str, torch.Tensor]":
    """Some rows [N, …] of tensors in a safetensors file; no others take memory.

    Args:
        names: of the tensors; None: all of them.

    Raises:
        BadInputFileError: the file cannot be read any more.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        # Opened for each call: what a mapped file has shown counts as memory until it is closed.
        with safe_open(path, "pt") as file:
            return {
                name: torch.cat([file.get_slice(name)[int(k) : int(k) + 1] for k in places])
                for name in names or file.keys()
            }
    except (SafetensorError, OSError) as error:
        mend = artifacts.how_to_remake(path)
        raise BadInputFileError(f"{path} is damaged ({error}); {mend}") from None


class RowReader:
    """The rows of an inspected file of one or more tensors [N, …], or of some for each size."""

    def __init__(self, artifact: Artifact, warn: Callable[[str], None]) -> None:
        """
        Args:
            warn: is told what could not be verified of a file without our header.

        Raises:
            BadInputFileError: the file cannot be read.
            NotFiniteError: a tensor holds an infinity or a not-a-number.
        """
        self.path = artifact.path
        self._places = row_places(artifact)
        self._names = {
            ending: known_names(self.path.name, own)
            for ending, own in layouts_by_ending(artifact).items()
        }
        by_ending: dict[str, list[int]] = {}
        for row, place in enumerate(self._places):
            by_ending.setdefault(place.ending, []).append(row)
        self.sizes = [*by_ending.values()]  # all rows, those of one size together
        _warn_of_elsewhere(artifact, warn)
        for rows in self.sizes:
            for first in range(0, len(rows), ROWS_AT_ONCE):
                some = self.read(rows[first : first + ROWS_AT_ONCE])
                artifacts.check_finite(some, self.path, "cannot be used")

    def read(self, rows: Sequence[int]) -> "dict[str, torch.Tensor]":
        """Some rows of one size, [N, …] of every tensor."""
        ending = self._places[rows[0]].ending
        names = {f"{name}{ending}": name for name in self._names[ending]}
        found = read_rows(self.path, [self._places[row].row for row in rows], [*names])
        return {name: found[whole] for whole, name in names.items()}

    def tensors(self) -> "dict[str, TensorOnDisk]":
        """Each tensor by its name, to be indexed by rows as if it were in memory.

        Of a file whose rows are of one size.
        """
        return {name: TensorOnDisk(self.path, name) for name in self._names[""]}


@dataclass(frozen=True)
class TensorOnDisk:
    """A tensor [N, …] of a file."""

    path: Path
    name: str

    def __getitem__(self, places: Sequence[int]) -> "torch.Tensor":
        """Some rows of it."""
        return read_rows(self.path, places, [self.name])[self.name]


def _warn_of_elsewhere(artifact: Artifact, warn: Callable[[str], None]) -> None:
    """Say what cannot be verified of a file without our header."""
    if artifact.header is None:
        warn(
            f"{artifact.path} has no header of ours: its settings, its checksum and the weights "
            "it was made with cannot be verified"
        )
