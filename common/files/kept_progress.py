"""What a stage has done so far, kept on the disk so that a stopped run goes on from there.

Progress is used only by a run whose key is the same: the recipe of its output, and how it computes.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from common.errors import BadInputFileError
from common.files import artifacts
from common.files.recipe import Recipe, difference, fact_differences, to_json
from common.text_files import parse_json, read_text
from common.whole_files import remove_file, write_text_whole

if TYPE_CHECKING:
    import torch


KEY = "staged_diffusion_progress"
MADE_BY_FILE = "made_by.json"  # once for all files of a folder, since a recipe has all prompts

SECONDS_BETWEEN_SAVES = 30.0

# Which one: its number; or, where it is of rows, their fingerprints.
Group = int | Sequence[str]


class Making(NamedTuple):
    """How rows were made."""

    seconds: float | None  # of devices, that each took
    made_by: dict[str, Any]  # options that their bits depend on


UNTOLD = Making(None, {})


class KeptRow(NamedTuple):
    """Where a row is that a finished group has."""

    path: Path
    place: int
    making: Making


class KeptRows(NamedTuple):
    """The rows that a finished group has."""

    fingerprints: list[str]
    making: Making


class Progress:
    """A stage's finished groups, and the steps of the group that runs."""

    def __init__(
        self, run_dir: Path, stage: int, facts: dict[str, Any], recipe: Recipe | None = None
    ) -> None:
        """
        Args:
            facts: everything that must be the same for a run to go on from another's progress,
                the fingerprint of what it makes included.
            recipe: of what it makes, for `why_unused`.
        """
        self.facts = facts
        text = json.dumps(facts, sort_keys=True, ensure_ascii=False)
        self.key = hashlib.sha256(text.encode()).hexdigest()
        dump = None if recipe is None else recipe.model_dump()
        self._made_by = to_json({"facts": facts, "recipe": dump})
        self._is_said = False
        self.folder, self.file = progress_paths(run_dir, stage)
        self.count_from_now()

    def why_unused(self, rows: Collection[str] = ()) -> str | None:
        """What keeps an earlier run's progress from being used, in words.

        None where there is none, it is of this run, or it is damaged.

        Args:
            rows: fingerprints of those that are to be made; progress that has one is used.
        """
        own = json.loads(self._made_by)
        try:
            made = parse_json(read_text(self.folder / MADE_BY_FILE))
            is_same = made["facts"] == own["facts"]
            if is_same and (made["recipe"] == own["recipe"] or self._rows_begun() & {*rows}):
                return None
            recipes = (Recipe.model_validate(made["recipe"]), Recipe.model_validate(own["recipe"]))
            facts = fact_differences(made["facts"], own["facts"])
            return difference(*recipes) or ", ".join(facts)
        except (OSError, ValueError, LookupError, TypeError):
            return None

    def _rows_begun(self) -> set[str]:
        """The rows of all groups that are kept, finished or not."""
        found: set[str] = set()
        for path in [self.file, *self._group_files()]:
            group = (self._said_of(path) or {}).get("group")
            found |= {*group} if isinstance(group, list) else set()
        return found

    def read_group(self, index: int) -> "dict[str, torch.Tensor] | None":
        """What a finished group gave; None where it is not finished."""
        return self._read(self._group_file(index), {"group": index})

    def save_group(self, group: Group, tensors: "dict[str, torch.Tensor]", **facts: Any) -> Path:
        """Keep what a group gave, in place of its steps. Returns where.

        Args:
            facts: of a group of rows those of its `Making`.
        """
        path = self._group_file(group)
        self._save(path, {"group": group, **facts}, tensors)
        remove_file(self.file)
        self.count_from_now()
        return path

    def find_rows(self) -> dict[str, KeptRow]:
        """The rows that finished groups have, by their fingerprints."""
        found = {}
        for path in self._group_files():
            said = self._said_of(path)
            if said is None or not isinstance(said["group"], list):
                continue
            for place, fingerprint in enumerate(said["group"]):
                found[fingerprint] = KeptRow(path, place, _making(said))
        return found

    def new_groups(self, seen: set[Path]) -> "Iterator[tuple[KeptRows, dict[str, torch.Tensor]]]":
        """Finished groups of rows, and what they gave: those that are not among `seen` yet."""
        for path in self._group_files():
            said = None if path in seen else self._said_of(path)
            seen.add(path)
            if said is None or not isinstance(said["group"], list):
                continue
            tensors = _tensors_in(path)
            if tensors is not None:
                yield KeptRows(said["group"], _making(said)), tensors

    def _group_files(self) -> Iterator[Path]:
        yield from sorted(self.folder.glob("group_*.safetensors"))

    def read_steps(self, group: Group) -> "dict[str, torch.Tensor] | None":
        """The state of a group between two steps; None where there is none."""
        return self._read(self.file, {"group": group})

    def save_steps(self, group: Group, tensors: "dict[str, torch.Tensor]") -> None:
        """Keep the state of a group between two steps."""
        self._save(self.file, {"group": group}, tensors)
        self.count_from_now()

    def count_from_now(self) -> None:
        """Begin to count the seconds until the state is to be kept."""
        self._saved_at = time.monotonic()

    def is_due(self) -> bool:
        """Whether it is time to keep the state again."""
        return time.monotonic() - self._saved_at >= SECONDS_BETWEEN_SAVES

    def _group_file(self, group: Group) -> Path:
        if isinstance(group, int):
            return self.folder / f"group_{group:04d}.safetensors"
        name = hashlib.sha256("\n".join(group).encode()).hexdigest()[:16]
        return self.folder / f"group_{name}.safetensors"

    def _save(self, path: Path, facts: dict[str, Any], tensors: "dict[str, torch.Tensor]") -> None:
        if not self._is_said:
            write_text_whole(self.folder / MADE_BY_FILE, self._made_by)
            self._is_said = True
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        content = self._content(facts, contiguous, artifacts.hash_tensors(contiguous))
        artifacts.save_whole(path, contiguous, {KEY: json.dumps(content)})

    def _content(
        self, facts: dict[str, Any], names: Iterable[str], data_sha256: str
    ) -> dict[str, Any]:
        """What a file says of itself: of what it is, its tensors' names and their checksum."""
        return {**facts, "key": self.key, "tensors": sorted(names), "data_sha256": data_sha256}

    def _read(self, path: Path, facts: dict[str, Any]) -> "dict[str, torch.Tensor] | None":
        """Tensors that are whole and of this key; None else."""
        said = self._said_of(path)
        if said is None or {name: said.get(name) for name in facts} != _as_read_back(facts):
            return None
        return _tensors_in(path)

    def _said_of(self, path: Path) -> dict[str, Any] | None:
        """What a file says of itself, if it is whole and of this key; None else."""
        from safetensors import SafetensorError, safe_open

        try:
            found = artifacts.inspect(path)
            with safe_open(path, "pt") as file:
                said: dict[str, Any] = json.loads(file.metadata()[KEY])
            own = self._content(said, found.tensors, found.data_sha256)
            return said if "group" in said and said == own else None
        except (BadInputFileError, SafetensorError, OSError, ValueError, LookupError, TypeError):
            return None


def _tensors_in(path: Path) -> "dict[str, torch.Tensor] | None":
    """All tensors of a file; None where it cannot be read any more."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):
        return None


def _making(said: dict[str, Any]) -> Making:
    return Making(said["seconds"], said["made_by"])


def _as_read_back(facts: dict[str, Any]) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(json.dumps(facts))
    return read


def progress_paths(run_dir: Path, stage: int) -> tuple[Path, Path]:
    """The folder of a stage's finished groups, and the file of the running group's steps."""
    return run_dir / f"stage{stage}_progress", run_dir / f"stage{stage}_progress.safetensors"


def remove_progress(run_dir: Path, stage: int) -> None:
    """Remove a stage's progress, whatever it is of: the output is written."""
    folder, file = progress_paths(run_dir, stage)
    remove_file(file)
    if folder.is_dir():
        shutil.rmtree(folder, ignore_errors=True)
