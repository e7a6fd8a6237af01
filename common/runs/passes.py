"""Further passes of a run over its latents: enlarged ones again, and SDXL's refiner.

A pass is a run directory of its own below the run's, so that its embeddings and latents are files
like any other: it begins with the latents of the pass before it, and is run, rerun and profiled by
the same stages.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from common.declared import INPUT, MODEL
from common.errors import BadSettingError, listed
from common.files.stage_table import DENOISE, ENCODE_PICTURES, FIRST, LAST, STAGES, Stage
from common.messages import say
from common.models.find import open_checkpoint
from common.runs.flags import all_flags
from common.runs.generation import read_generation_config
from common.runs.in_turn import (
    begins_with_pictures,
    libraries_of,
    picture_path,
    plan,
    run_in_turn,
)
from common.runs.inputs import enlarged_size

HIRES, REFINER = "hires", "refiner"  # the passes, and their folders
NAMES = (HIRES, REFINER)
ENSEMBLE_END = 0.8  # of the base, as in diffusers' documentation of SDXL's ensemble of experts
HIRES_STRENGTH = 0.6
# What only the first pass begins with, or what each pass has of its own.
_OF_THE_FIRST = (
    *("init_latents", "upscale", "strength", "denoising_start", "denoising_end"),
    *("height", "width", "input_dir", "output_dir"),
)


@dataclass(frozen=True, kw_only=True)
class Passes:
    """The passes that are asked for after the first."""

    hires: float | None = None  # how many times larger
    hires_strength: float | None = None
    refiner: str | None = None  # its checkpoint
    refiner_strength: float | None = None  # None: an ensemble of experts

    def __post_init__(self) -> None:
        for name in NAMES:
            if getattr(self, f"{name}_strength") is not None and getattr(self, name) is None:
                raise BadSettingError(f"--{name}_strength is for --{name}: give that as well")
        if self.hires is not None and self.hires <= 1:
            raise BadSettingError(f"--hires {self.hires}: give a number over 1, as 1.5")
        if self.hires is not None and self.refiner is not None and self.refiner_strength is None:
            raise BadSettingError(
                "--hires and --refiner: give --refiner_strength, since enlarged latents have not "
                "the noise that an ensemble of experts goes on with"
            )

    @property
    def names(self) -> list[str]:
        """Those that there are, in their order."""
        return [name for name in NAMES if getattr(self, name) is not None]

    @property
    def is_ensemble(self) -> bool:
        """Whether the refiner takes the last steps of the base's own schedule."""
        return self.refiner is not None and self.refiner_strength is None

    def flags_of_the_first(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The flags of the first pass: in an ensemble it ends early."""
        if not self.is_ensemble:
            return dict(given)
        return {"denoising_end": ENSEMBLE_END, **given}

    def flags_of(self, name: str, given: Mapping[str, Any], run_dir: Path) -> dict[str, Any]:
        """The flags of a pass, whose predecessor's latents are there."""
        before = run_dir
        for each in self.names[: self.names.index(name)]:
            before = run_dir / each
        config = read_generation_config(before)
        others = {f.name for f in all_flags() if f.declared.group == INPUT} | {*_OF_THE_FIRST}
        size = (config.height, config.width)
        own: dict[str, Any] = {"output_dir": run_dir / name, "init_latents": before}
        if name == HIRES:
            factor = open_checkpoint(config, ()).vae_scale_factor
            cells = enlarged_size([side // factor for side in size], self.hires)
            size = (cells[0] * factor, cells[1] * factor)
            own |= {"upscale": self.hires, "strength": self.hires_strength or HIRES_STRENGTH}
        else:
            others |= self.dropped(given)
            own["model_id"] = self.refiner
            if self.is_ensemble:
                own["denoising_start"] = config.denoising_end
            else:
                own["strength"] = self.refiner_strength
        kept = {flag: value for flag, value in given.items() if flag not in others}
        return {**kept, **own, "height": size[0], "width": size[1]}

    def dropped(self, given: Mapping[str, Any]) -> set[str]:
        """The flags given for the base's models, which the refiner does without."""
        of_models = {f.name for f in all_flags() if f.declared.group == MODEL}
        of_models |= {"embedding"}
        return {name for name in given if name in of_models and not name.endswith("dtype")}


class Turns:
    """All stages of all passes of a run, one after the other."""

    def __init__(
        self,
        passes: Passes,
        run_dir: Path,
        given: Mapping[str, Any],
        *,
        from_stage: str = str(FIRST.number),
        to_stage: int = LAST.number,
        force: bool = False,
    ) -> None:
        """
        Args:
            from_stage: a stage's number, or a pass's name.

        Raises:
            BadSettingError: stages out of order, or flags that no stage to run knows.
        """
        self.passes, self.run_dir, self.force = passes, run_dir, force
        self.given = passes.flags_of_the_first(given)
        self.to_stage = to_stage
        self.names = passes.names
        if self.names and to_stage != LAST.number:
            raise BadSettingError(f"--to_stage does not go with --{self.names[0]}: leave it out")
        self.first: dict[Stage, list[str]] = {}
        if from_stage in self.names:
            self.names = self.names[self.names.index(from_stage) :]
            return
        if not from_stage.isdecimal():
            known = ", ".join([*(str(stage.number) for stage in STAGES), *self.names])
            raise BadSettingError(f"--from_stage {from_stage}: this run has {known}")
        self.from_stage = int(from_stage)
        last = DENOISE.number if self.names else to_stage
        self.first = plan(self.given, from_stage=self.from_stage, to_stage=last, force=force)

    def run(self) -> tuple[int, Path | None]:
        """Run everything. Returns the exit code of the first stage that failed, or 0, and the
        picture that was made.
        """
        source_dir = Path(self.given.get("input_dir", self.run_dir))
        if self.first:
            settled = source_dir if self.from_stage == ENCODE_PICTURES.number else self.run_dir
            pictures = partial(begins_with_pictures, settled)
            code = run_in_turn(self.first, libraries_of(self.given), pictures)
            if code != 0 or (not self.names and self.to_stage != LAST.number):
                return code, None
            if not self.names:
                alone = self.from_stage == self.to_stage
                latents_dir = source_dir if alone else self.run_dir
                return 0, picture_path(self.run_dir, latents_dir, self.given.get("image_format"))
        for name in self.names:
            folder = self.run_dir / name
            flags = self.passes.flags_of(name, self.given, self.run_dir)
            say(f"{name}: {folder}")
            dropped = self.passes.dropped(self.given) - {"model_id"}
            if name == REFINER and dropped:
                say(f"  without {listed([f'--{flag}' for flag in sorted(dropped)])} of the base")
            last = LAST.number if name == self.names[-1] else DENOISE.number
            commands = plan(flags, to_stage=last, force=self.force)
            code = run_in_turn(commands, libraries_of(flags), lambda: False)
            if code != 0:
                return code, None
        return 0, picture_path(folder, folder, self.given.get("image_format"))
