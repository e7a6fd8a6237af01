"""What a stage has done so far, kept on the disk so that a stopped run goes on from there.

Progress is used only by a run whose key is the same: the recipe of its output, and how it computes.
"""

import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import BadInputFileError
from common.files import artifacts
from common.files.artifacts import Recipe
from common.runs.flags import say
from common.runs.generation import RunOptions
from common.stopping import StoppedError, StopRequest
from common.whole_files import remove_file, write_bytes_whole

if TYPE_CHECKING:
    import numpy as np
    import torch

    from common.sampling.denoiser import Denoiser

KEY = "staged_diffusion_progress"
SECONDS_BETWEEN_SAVES = 30.0
DEVICE_FACTS = ("backend", "mesh", "platform", "device", "devices")


class Progress:
    """A stage's finished groups, and the steps of the group that runs."""

    def __init__(self, run_dir: Path, stage: int, facts: dict[str, Any]) -> None:
        """
        Args:
            facts: everything that must be the same for a run to go on from another's progress.
        """
        text = json.dumps(facts, sort_keys=True, ensure_ascii=False)
        self.key = hashlib.sha256(text.encode()).hexdigest()
        self.folder, self.file = progress_paths(run_dir, stage)
        self.count_from_now()

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
        from safetensors.torch import save

        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        content = {**facts, "key": self.key, "data_sha256": artifacts.hash_tensors(contiguous)}
        write_bytes_whole(path, save(contiguous, metadata={KEY: json.dumps(content)}))

    def _read(self, path: Path, facts: dict[str, Any]) -> "dict[str, torch.Tensor] | None":
        """Tensors that are whole and of this key; None else."""
        from safetensors import SafetensorError, safe_open

        try:
            found = artifacts.inspect(path)
            with safe_open(path, "pt") as file:
                content = json.loads(file.metadata()[KEY])
                expected = {**facts, "key": self.key, "data_sha256": found.data_sha256}
                if content != expected:
                    return None
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (BadInputFileError, SafetensorError, OSError, ValueError, LookupError, TypeError):
            return None


def progress_of(
    run_dir: Path, recipe: Recipe, options: RunOptions, devices: dict[str, Any], **facts: Any
) -> Progress | None:
    """The progress of a stage's run; None where none is kept: it is measured, or one of several.

    Args:
        recipe: of what the stage makes.
        devices: what the report says of them.
        facts: what else must be the same for a run to go on from another's progress.
    """
    import torch

    if options.distributed is not None or options.why_measure() is not None:
        return None
    return Progress(
        run_dir,
        recipe.stage,
        {
            "fingerprint": recipe.fingerprint(),
            "batch_size": options.batch_size,
            "operations": options.operations,
            "save_trajectory": options.save_trajectory,
            **{name: devices.get(name) for name in DEVICE_FACTS},
            # Sums are split over a CPU's threads.
            "threads": torch.get_num_threads() if devices["platform"] == "cpu" else None,
            **facts,
        },
    )


def progress_paths(run_dir: Path, stage: int) -> tuple[Path, Path]:
    """The folder of a stage's finished groups, and the file of the running group's steps."""
    return run_dir / f"stage{stage}_progress", run_dir / f"stage{stage}_progress.safetensors"


def remove_progress(run_dir: Path, stage: int) -> None:
    """Remove a stage's progress, whatever it is of: the output is written."""
    folder, file = progress_paths(run_dir, stage)
    remove_file(file)
    if folder.is_dir():
        shutil.rmtree(folder, ignore_errors=True)


class GroupProgress:
    """One group's part of the progress that is kept; keeps nothing where there is none."""

    def __init__(
        self,
        progress: Progress | None,
        stop: StopRequest | None,
        every: int | None,
        number: int,
        bar: Any,
    ) -> None:
        """
        Args:
            every: steps between two saves; None goes by time.
            number: of the group, from 0.
        """
        self.progress, self.stop, self.every = progress, stop, every
        self.number, self.bar = number, bar

    def finished(self) -> "dict[str, torch.Tensor] | None":
        """What an earlier run kept of this group, all of it done."""
        return None if self.progress is None else self.progress.read_group(self.number)

    def resume(self, denoiser: "Denoiser") -> None:
        """Go on where an earlier run was stopped within this group."""
        kept = None
        if self.progress is not None:
            self.progress.count_from_now()
        if self.progress is not None and denoiser.can_resume:
            kept = self.progress.read_steps(self.number)
        if kept is not None:
            denoiser.resume(kept)
            self.bar.update(denoiser.done)
            say(f"  goes on after step {denoiser.done} of {denoiser.evaluations}")
        self.shown = denoiser.done

    def rest_after(self, evaluations: int) -> range:
        """The steps after which progress is kept whatever the time."""
        every = self.every if self.progress is not None else None
        return range(every, evaluations, every) if every is not None else range(0)

    def wants_rest(self) -> bool:
        """Whether progress is to be kept as soon as what runs is done."""
        if self.stop is not None and self.stop.number is not None:
            return True
        return self.progress is not None and self.every is None and self.progress.is_due()

    def after_a_range(self, denoiser: "Denoiser") -> None:
        """Show what is done, keep it where it is time, and stop where that is asked for."""
        self.bar.update(denoiser.done - self.shown)
        self.shown = denoiser.done
        if not denoiser.at_rest:
            return
        # Once: what comes from here on stops the next range.
        number = None if self.stop is None else self.stop.number
        due = denoiser.done < denoiser.evaluations and (
            self.wants_rest() or denoiser.done in self.rest_after(denoiser.evaluations)
        )
        keeps = self.progress is not None and denoiser.can_resume
        if keeps and (number is not None or due):
            assert self.progress is not None
            with denoiser.report.part("writing"):
                self.progress.save_steps(self.number, denoiser.state_to_keep())
        if number is not None and (keeps or denoiser.done < denoiser.evaluations):
            steps = f"step {denoiser.done} of {denoiser.evaluations}"
            said = f"after {steps}, which are kept: the same command goes on from there"
            if not keeps:
                said = f"after {steps}: the same command begins these images again"
            raise StoppedError(number, said)

    def keep_finished(self, arrays: "dict[str, np.ndarray]") -> None:
        """Keep what the group gave until all groups are done."""
        import torch

        if self.progress is not None:
            tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
            self.progress.save_group(self.number, tensors)
