"""Further passes of a run over its latents: enlarged ones again, and SDXL's refiner.

A pass is a run directory of its own below the run's, so that its embeddings and latents are files
like any other: it begins with the latents of the pass before it, and is run, rerun and profiled by
the same stages.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.conditions.prompt_settings import AskedPrompts, PromptSettings
from common.declared import INPUT, MODEL, declarations, flag_of
from common.errors import BadSettingError, listed
from common.files.recipe import to_json
from common.files.run_files import GENERATION_CONFIG_FILE
from common.files.stage_table import DENOISE, ENCODE_PICTURES, FIRST, LAST, STAGES, Stage
from common.messages import say
from common.models.find import open_checkpoint
from common.runs.flags import Given, all_flags
from common.runs.generation import (
    GenerationConfig,
    RunSettings,
    read_generation_config,
    read_run_settings,
)
from common.runs.in_turn import (
    libraries_of,
    picture_path,
    plan,
    run_in_turn,
)
from common.runs.inputs import enlarged_size
from common.runs.prompts_file import read_prompts_file
from common.whole_files import write_text_whole

HIRES, REFINER = "hires", "refiner"  # the passes, and their folders
NAMES = (HIRES, REFINER)
# In a pass's folder: what it has of the run before it, as its first stage reads it.
SETTINGS_FILE, PROMPTS_FILE = "pass_settings.json", "pass_prompts.jsonl"
ENSEMBLE_END = 0.8  # of the base, as in diffusers' documentation of SDXL's ensemble of experts
HIRES_STRENGTH = 0.6
# What only the first pass begins with, or what each pass has of its own.
_OF_THE_FIRST = (
    *("init_latents", "upscale", "strength", "denoising_start", "denoising_end"),
    *("height", "width", "input_dir", "output_dir"),
)


def passes_in(run_dir: Path) -> list[Path]:
    """The folders of the further passes that a run has made."""
    return [run_dir / each for each in NAMES if (run_dir / each / GENERATION_CONFIG_FILE).exists()]


@dataclass(frozen=True, kw_only=True)
class Passes:
    """The passes that are asked for after the first."""

    hires: float | None = None  # how many times larger
    hires_strength: float | None = None
    refiner: str | None = None  # its checkpoint
    refiner_strength: float | None = None  # None: an ensemble of experts

    def __post_init__(self) -> None:
        for name in NAMES:
            strength = getattr(self, f"{name}_strength")
            if strength is not None and getattr(self, name) is None:
                raise BadSettingError(f"--{name}_strength is for --{name}: give that as well")
            if strength is not None and not 0 < strength <= 1:
                raise BadSettingError(
                    f"--{name}_strength {strength}: give a number over 0, and at most 1"
                )
        most = next(
            at.le for at in RunSettings.model_fields["upscale"].metadata if hasattr(at, "le")
        )
        if self.hires is not None and not 1 < self.hires <= most:
            raise BadSettingError(
                f"--hires {self.hires}: give a number over 1 and at most {most}, as 1.5"
            )
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

    def refuse_unfit(self, settings: RunSettings | GenerationConfig) -> None:
        """Raise `BadSettingError` where the first pass is to do what no other one goes on from."""
        if not self.names:
            return
        last = self.names[-1]
        if settings.denoising_end is not None and not self.is_ensemble:
            raise BadSettingError(
                f"--denoising_end leaves noise, and --{self.names[0]} adds its own: leave "
                "--denoising_end out"
            )
        for name in ("keep_unmasked", "padding_mask_crop"):
            if getattr(settings, name) not in (None, False):
                raise BadSettingError(
                    f"--{name} pastes into the pictures begun with, and --{last} makes all of them "
                    "anew: leave one of both out"
                )
        self.refuse_sizes(settings)
        if self.hires is not None:
            checkpoint = open_checkpoint(settings, ("unet",))
            if checkpoint.edits_pictures or checkpoint.inpaints_by_channels:
                raise BadSettingError(
                    f"{checkpoint.source('unet').said}: its UNet is shown pictures, which --hires "
                    "has none of: leave it out, or choose another checkpoint"
                )

    def refuse_sizes(self, settings: RunSettings | GenerationConfig) -> None:
        """Raise `BadSettingError` where the pass before has latents of several sizes."""
        if any(prompt.settings.keys() & {"height", "width"} for prompt in _prompts_of(settings)):
            raise BadSettingError(
                f"--{self.names[0]} goes on from latents of one size: leave it out, or height and "
                "width of the prompts"
            )

    def flags_of_the_first(
        self, given: Mapping[str, Any], settings: RunSettings | GenerationConfig
    ) -> dict[str, Any]:
        """The flags of the first pass: in an ensemble it ends early."""
        if not self.is_ensemble or settings.denoising_end is not None:
            return dict(given)
        return {"denoising_end": ENSEMBLE_END, **given}

    def before(self, name: str, run_dir: Path) -> Path:
        """The folder of the pass before one."""
        earlier = self.names[: self.names.index(name)]
        return run_dir / earlier[-1] if earlier else run_dir

    def flags_of(
        self, name: str, given: Mapping[str, Any], run_dir: Path, *, alone: bool = False
    ) -> dict[str, Any]:
        """The flags of a pass, whose predecessor's latents are there.

        All that the run before it was settled to stands in files that `write_settings` writes.

        Args:
            alone: whether the run begins with this pass, so that the prompts given are its own.

        Raises:
            BadSettingError: `alone`, a negative prompt without a prompt is given.
        """
        before = self.before(name, run_dir)
        config = read_generation_config(before)
        size = (config.height, config.width)
        own: dict[str, Any] = {
            **{"output_dir": run_dir / name, "config": run_dir / name / SETTINGS_FILE},
            "init_latents": before,
        }
        others = _flags_of(INPUT) | {*_OF_THE_FIRST}
        if name == HIRES:
            factor = open_checkpoint(config, ()).vae_scale_factor
            cells = enlarged_size([side // factor for side in size], self.hires)
            size = (cells[0] * factor, cells[1] * factor)
            strength = self.hires_strength
            own |= {"upscale": self.hires}
            own |= {"strength": HIRES_STRENGTH if strength is None else strength}
        else:
            others |= _flags_of(MODEL) | {"embedding"}
            own["model_id"] = self.refiner
            if self.is_ensemble:
                own["denoising_start"] = config.denoising_end
            else:
                own["strength"] = self.refiner_strength
        asked = _PROMPT_FLAGS & given.keys() if alone else set()
        if asked and not asked & {"prompt", "prompts_file"}:
            raise BadSettingError(
                f"--from_stage {name} has the prompts of the pass before: give --prompt with "
                f"{listed([f'--{flag}' for flag in sorted(asked)])}"
            )
        if not asked:
            others |= _PROMPT_FLAGS
            own["prompts_file"] = run_dir / name / PROMPTS_FILE
        kept = {f: v for f, v in given.items() if f not in others or f.endswith("dtype")}
        return {**kept, **own, "height": size[0], "width": size[1]}

    def write_settings(self, name: str, run_dir: Path) -> None:
        """Write what a pass has of the run before it: its settings, and its prompts."""
        config = read_generation_config(self.before(name, run_dir))
        settings = self.settings_of(name, config)
        prompts = [prompt.model_dump(exclude={"image", "mask_image"}) for prompt in config.prompts]
        own = [each.pop("settings") for each in prompts]
        dropped = self._dropped_names(name, config)
        lines = [
            to_json(
                {k: v for k, v in each.items() if _says(k, v)}
                | {k: v for k, v in more.items() if k not in dropped}
            )
            for each, more in zip(prompts, own, strict=True)
        ]
        (run_dir / name).mkdir(exist_ok=True)
        write_text_whole(run_dir / name / SETTINGS_FILE, to_json(settings) + "\n")
        write_text_whole(run_dir / name / PROMPTS_FILE, "\n".join(lines) + "\n")

    def settings_of(self, name: str, config: GenerationConfig) -> dict[str, Any]:
        """The settings that a pass has of the run before it, but for the prompts."""
        settings = config.model_dump(mode="json", exclude_defaults=True, exclude={"prompts"})
        dropped = self._dropped_names(name, config)
        return {name: value for name, value in settings.items() if name not in dropped}

    def _dropped_names(self, name: str, config: GenerationConfig) -> set[str]:
        """The settings, of the run or of its prompts, that a pass has not of the run before it."""
        of_models = {*self.dropped(config), "model_id"} if name == REFINER else set()
        return _settings_of(INPUT) | {*_OF_THE_FIRST} | of_models

    def dropped(self, config: GenerationConfig) -> list[str]:
        """The settings of the base's models, which the refiner does without."""
        of_models = (_settings_of(MODEL) | {"embeddings"}) - {"model_id"}
        given = {name for prompt in config.prompts for name in prompt.settings}
        given |= config.model_dump(exclude_defaults=True).keys()
        return sorted(name for name in given & of_models if not name.endswith("dtype"))


def _prompts_of(settings: RunSettings | GenerationConfig) -> Sequence[PromptSettings]:
    """The prompts that settings have, or ask for in a file."""
    if isinstance(settings, GenerationConfig):
        return settings.prompts
    file = settings.prompts_file
    return () if file is None else read_prompts_file(file, settings)


def _says(name: str, value: Any) -> bool:
    """Whether a line of prompts needs a value: no negative prompt is one, unlike no seed."""
    return value is not None or name == "negative_prompt"


def _flags_of(group: str) -> set[str]:
    return {flag.name for flag in all_flags() if flag.declared.group == group}


def _settings_of(group: str) -> set[str]:
    return {name for name, declared in declarations(RunSettings) if declared.group == group}


_PROMPT_FLAGS = {
    name
    for setting, declared in declarations(AskedPrompts)
    for name in (declared.flag or setting, *(declared.none_flag or ())[:1])
}


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
        stream: bool = False,
    ) -> None:
        """
        Args:
            stream: whether stage 3 decodes while stage 2 runs.
            from_stage: a stage's number, or a pass's name.

        Raises:
            BadSettingError: stages out of order, or flags that no stage to run knows.
        """
        self.passes, self.run_dir, self.force = passes, run_dir, force
        self.stream = stream
        self.given, self.to_stage, self.names = dict(given), to_stage, passes.names
        if self.names and to_stage != LAST.number:
            raise BadSettingError(f"--to_stage does not go with --{self.names[0]}: leave it out")
        self.first: dict[Stage, list[str]] = {}
        self.begins_with_a_pass = from_stage in self.names
        if self.begins_with_a_pass:
            self.names = self.names[self.names.index(from_stage) :]
            before = passes.before(from_stage, run_dir)
            if (before / GENERATION_CONFIG_FILE).exists():
                passes.refuse_sizes(read_generation_config(before))
            return
        if not from_stage.isdecimal():
            known = ", ".join([*(str(stage.number) for stage in STAGES), *self.names])
            raise BadSettingError(f"--from_stage {from_stage}: this run has {known}")
        self.from_stage = int(from_stage)
        if self.names:
            settings = self._settings_of_the_first()
            passes.refuse_unfit(settings)
            self.given = passes.flags_of_the_first(given, settings)
        last = DENOISE.number if self.names else to_stage
        self.first = plan(self.given, from_stage=self.from_stage, to_stage=last, force=force)

    def run(self, run_stages: Callable[..., int] = run_in_turn) -> tuple[int, Path | None]:
        """Run everything. Returns the exit code of the first stage that failed, or 0, and the
        picture that was made.

        Args:
            run_stages: as `run_in_turn`, which has a process for each.
        """
        source_dir = Path(self.given.get("input_dir", self.run_dir))
        if self.first:
            settled = source_dir if self.from_stage == ENCODE_PICTURES.number else self.run_dir
            stream = self.run_dir if self.stream else None
            libraries = libraries_of(self.given)
            code = run_stages(self.first, libraries, settled, stream=stream)
            if code != 0 or (not self.names and self.to_stage != LAST.number):
                return code, None
            if not self.names:
                alone = self.from_stage == self.to_stage
                latents_dir = source_dir if alone else self.run_dir
                return 0, picture_path(self.run_dir, latents_dir, self.given)
        for name in self.names:
            folder = self.run_dir / name
            alone = self.begins_with_a_pass and name == self.names[0]
            flags = self.passes.flags_of(name, self.given, self.run_dir, alone=alone)
            self.passes.write_settings(name, self.run_dir)
            say(f"{name}: {folder}")
            self._say_what_is_left_out(name)
            last = LAST.number if name == self.names[-1] else DENOISE.number
            commands = plan(flags, to_stage=last, force=self.force)
            stream = folder if self.stream else None
            code = run_stages(commands, libraries_of(flags), None, stream=stream)
            if code != 0:
                return code, None
        return 0, picture_path(folder, folder, self.given)

    def _settings_of_the_first(self) -> RunSettings | GenerationConfig:
        """What the first pass is asked for, or was settled to."""
        flags = Given(FIRST, {name: v for name, v in self.given.items() if name != "dtype"})
        if self.from_stage == FIRST.number:
            return read_run_settings(flags.flags.config, flags.settings())
        return read_generation_config(flags.source_dir).override(flags.settings())[0]

    def _say_what_is_left_out(self, name: str) -> None:
        """Say what of the run before it a pass does without."""
        config = read_generation_config(self.passes.before(name, self.run_dir))
        if self.begins_with_a_pass and "config" in self.given:
            say("  its settings are those of the pass before it; flags change them, not --config")
        if config.inpaints:
            say("  the whole pictures: masks are the first pass's")
        dropped = self.passes.dropped(config) if name == REFINER else []
        if dropped:
            flags = [f"--{flag_of(RunSettings, each)}" for each in dropped]
            say(f"  without {listed(flags)} of the base")
