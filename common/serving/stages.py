"""All stages in this process, for programs and notebooks: opened once, for many runs."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from common.compute.kept import Kept
from common.errors import BadSettingError
from common.files.report import Report, read_report
from common.files.run_files import DEFAULT_OUTPUT_DIR
from common.files.stage_table import FIRST, STAGES
from common.runs.in_turn import begins_with_pictures, plan
from common.runs.run_index import read_index
from common.runs.stage_run import ResidentStage

if TYPE_CHECKING:
    from PIL.Image import Image


MODELS_OF_A_CHECKPOINT = 3  # its text encoders, its UNet, its VAE


class Run:
    """A run directory whose stages have run."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    @property
    def files(self) -> list[Path]:
        """Its pictures' files, in their order."""
        return [self.run_dir / line["file"] for line in read_index(self.run_dir)]

    @property
    def pictures(self) -> "list[Image]":
        """Its pictures, in their order."""
        from PIL import Image

        found = []
        for path in self.files:
            with Image.open(path) as picture:
                found.append(picture.copy())
        return found

    def report(self, stage: int) -> Report:
        """Where a stage's time went, and what it computed with.

        Raises:
            BadSettingError: it has not run here.
        """
        found = read_report(self.run_dir, stage)
        if found is None:
            raise BadSettingError(f"{self.run_dir} has no report of stage {stage}: run it first")
        return found


class Stages:
    """Stages that stay: the first run loads and compiles, further ones find all of it there.

        with Stages(model_id="models/demo") as stages:
            run = stages.run(prompt="a large red star on a blue background")
            run.pictures[0].show()

    What a run gives, to the bit, is what `run_all.sh` gives with the same flags.
    """

    def __init__(self, *, keep: int = 2, **flags: Any) -> None:
        """
        Args:
            keep: checkpoints that stay in memory.
            flags: of every run, by the names that `run_all.sh` has for them: `True` for a switch, a
                list where a flag may be given again.
        """
        if keep < 1:
            raise BadSettingError(f"keep {keep}: give a number of checkpoints, at least 1")
        kept = Kept(most_models=keep * MODELS_OF_A_CHECKPOINT)
        self._flags = flags
        self._residents = {stage: ResidentStage(stage, kept) for stage in STAGES}

    def run(self, *, output_dir: str | Path | None = None, **flags: Any) -> Run:
        """Make pictures; what is fresh in the folder is not made again.

        Args:
            output_dir: the run directory; None: a new one in `stage_outputs`.
            flags: of this run alone, as `Stages` takes them; they win over those of every run.

        Raises:
            StageError: as the stage's script would end, with its exit code.
        """
        given = {**self._flags, **flags}
        chosen = {
            k: value for k, value in given.items() if value is not None and value is not False
        }
        if wrong := [name for name in chosen if "-" in name]:
            raise BadSettingError(f"{wrong[0]}: flags have _ here in place of -")
        plan(chosen)  # a flag that no stage takes is refused before a folder is made
        run_dir = new_folder() if output_dir is None else Path(output_dir)
        for stage, command in plan({**chosen, "output_dir": run_dir}).items():
            if not stage.of_pictures or begins_with_pictures(run_dir):
                self._residents[stage].run(*command[2:])
        return Run(run_dir)

    def close(self) -> None:
        """Let go of models and programs."""
        self._residents[FIRST].close()  # what is kept is of all of them

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def new_folder() -> Path:
    """A run directory of its own, numbered, in `stage_outputs`."""
    number = 1
    while True:
        folder = DEFAULT_OUTPUT_DIR / f"run_{number:04d}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1
