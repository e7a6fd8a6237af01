"""What a stage has done so far, kept on the disk so that a stopped run goes on from there.

Progress is used only by a run whose key is the same: the recipe of its output, and how it computes.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import BadInputFileError
from common.files import artifacts
from common.files.recipe import Recipe, difference, fact_differences, to_json
from common.whole_files import remove_file

if TYPE_CHECKING:
    import torch


KEY, MADE_BY = "staged_diffusion_progress", "staged_diffusion_made_by"

SECONDS_BETWEEN_SAVES = 30.0


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
        text = json.dumps(facts, sort_keys=True, ensure_ascii=False)
        self.key = hashlib.sha256(text.encode()).hexdigest()
        dump = None if recipe is None else recipe.model_dump()
        self._made_by = to_json({"facts": facts, "recipe": dump})
        self.folder, self.file = progress_paths(run_dir, stage)
        self.count_from_now()

    def why_unused(self) -> str | None:
        """What keeps an earlier run's progress from being used, in words.

        None where there is none, it is of this run, or it is damaged.
        """
        from safetensors import SafetensorError, safe_open

        own = json.loads(self._made_by)
        for path in [self.file, *sorted(self.folder.glob("group_*.safetensors"))]:
            try:
                with safe_open(path, "np") as file:
                    metadata = file.metadata()
                if json.loads(metadata[KEY])["key"] == self.key:
                    return None
                made = json.loads(metadata[MADE_BY])
                recipes = (
                    Recipe.model_validate(made["recipe"]),
                    Recipe.model_validate(own["recipe"]),
                )
                return difference(*recipes) or ", ".join(
                    fact_differences(made["facts"], own["facts"])
                )
            except (SafetensorError, OSError, ValueError, LookupError, TypeError):
                continue
        return None

    def read_group(self, index: int) -> "dict[str, torch.Tensor] | None":
        """What a finished group gave; None where it is not finished."""
        return self._read(self._group_file(index), {"group": index})

    def save_group(self, index: int, tensors: "dict[str, torch.Tensor]") -> None:
        """Keep what a group gave, in place of its steps."""
        self._save(self._group_file(index), {"group": index}, tensors)
        remove_file(self.file)
        self.count_from_now()

    def read_steps(self, group: int) -> "dict[str, torch.Tensor] | None":
        """The state of a group between two steps; None where there is none."""
        return self._read(self.file, {"group": group})

    def save_steps(self, group: int, tensors: "dict[str, torch.Tensor]") -> None:
        """Keep the state of a group between two steps."""
        self._save(self.file, {"group": group}, tensors)
        self.count_from_now()

    def count_from_now(self) -> None:
        """Begin to count the seconds until the state is to be kept."""
        self._saved_at = time.monotonic()

    def is_due(self) -> bool:
        """Whether it is time to keep the state again."""
        return time.monotonic() - self._saved_at >= SECONDS_BETWEEN_SAVES

    def _group_file(self, index: int) -> Path:
        return self.folder / f"group_{index:04d}.safetensors"

    def _save(self, path: Path, facts: dict[str, Any], tensors: "dict[str, torch.Tensor]") -> None:
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        content = self._content(facts, contiguous, artifacts.hash_tensors(contiguous))
        metadata = {KEY: json.dumps(content), MADE_BY: self._made_by}
        artifacts.save_whole(path, contiguous, metadata)

    def _content(
        self, facts: dict[str, Any], names: Iterable[str], data_sha256: str
    ) -> dict[str, Any]:
        """What a file says of itself: of what it is, its tensors' names and their checksum."""
        return {**facts, "key": self.key, "tensors": sorted(names), "data_sha256": data_sha256}

    def _read(self, path: Path, facts: dict[str, Any]) -> "dict[str, torch.Tensor] | None":
        """Tensors that are whole and of this key; None else."""
        from safetensors import SafetensorError, safe_open

        try:
            found = artifacts.inspect(path)
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
                content = self._content(facts, found.tensors, found.data_sha256)
                if json.loads(metadata[KEY]) != content or metadata[MADE_BY] != self._made_by:
                    return None
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (BadInputFileError, SafetensorError, OSError, ValueError, LookupError, TypeError):
            return None


def progress_paths(run_dir: Path, stage: int) -> tuple[Path, Path]:
    """The folder of a stage's finished groups, and the file of the running group's steps."""
    return run_dir / f"stage{stage}_progress", run_dir / f"stage{stage}_progress.safetensors"


def remove_progress(run_dir: Path, stage: int) -> None:
    """Remove a stage's progress, whatever it is of: the output is written."""
    folder, file = progress_paths(run_dir, stage)
    remove_file(file)
    if folder.is_dir():
        shutil.rmtree(folder, ignore_errors=True)
