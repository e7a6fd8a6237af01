"""The settings of a run, composed of all groups, and the order in which they are decided.

Built-in default < `--config` file < flags. Stage 1 resolves them into `generation_config.json`;
later stages read that file and may override single settings for one run of theirs.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import model_validator

from common.conditions.dynamic_prompts import with_combinations
from common.conditions.edited_picture import EditSettings
from common.conditions.prompt_settings import AskedPrompts, PromptOptions, ResolvedPrompts
from common.conditions.sizes import AskedSize, ResolvedSize, SizeSettings
from common.declared import validate
from common.errors import BadInputFileError, BadSettingError
from common.files.picture_files import MOST_WEBP_PIXELS
from common.files.run_files import GENERATION_CONFIG_FILE
from common.models.model_settings import LoraSettings, ModelSettings
from common.runs.inputs import refuse_odd_inputs, size_of_latents, size_of_pictures, with_inputs
from common.runs.prompts_file import make_prompts, read_prompts_file
from common.runs.seeds import MOST_SEED, images_of, seeds_of
from common.runs.setting_groups import ASKED, SHARED, own_settings
from common.sampling.sampling_settings import SamplingSettings, merge_settings
from common.text_files import MOST_YAML_BYTES, parse_json, parse_yaml, read_text
from common.vae.input_settings import AskedInputs, InputSettings
from common.vae.vae_settings import VaeSettings
from common.whole_files import write_text_whole

if TYPE_CHECKING:  # a type checker cannot follow the lists

    class _Shared(
        EditSettings,
        VaeSettings,
        LoraSettings,
        ModelSettings,
        SamplingSettings,
        InputSettings,
        SizeSettings,
        PromptOptions,
    ): ...

    class _Asked(AskedSize, AskedInputs, AskedPrompts): ...

else:

    class _Shared(*reversed(SHARED)):
        pass

    class _Asked(*reversed(ASKED)):
        pass


class RunSettings(_Asked, _Shared):
    """Settings as they are asked for, in a `--config` file or by flags."""


class GenerationConfig(ResolvedSize, ResolvedPrompts, _Shared):
    """Every setting of a run, resolved: the content of `generation_config.json`."""

    @model_validator(mode="after")
    def _format_holds_the_pictures(self) -> Self:
        sizes = [self.height, self.width]
        for prompt in self.prompts:
            own = [prompt.settings.get(name) for name in ("height", "width")]
            sizes += [side for side in own if isinstance(side, int)]  # which are checked elsewhere
        if self.image_format == "webp" and max(sizes) > MOST_WEBP_PIXELS:
            raise ValueError(
                f"image_format webp holds at most {MOST_WEBP_PIXELS} pixels a side, not "
                f"{max(sizes)}: use png or jpg"
            )
        return self

    @model_validator(mode="after")
    def _inputs_go_together(self) -> Self:
        refuse_odd_inputs(self)
        return self

    @property
    def has_pictures(self) -> bool:
        """Whether the run begins with pictures."""
        return self.prompts[0].image is not None

    @property
    def inpaints(self) -> bool:
        """Whether a part of each picture is made anew."""
        return self.prompts[0].mask_image is not None or self.outpaint is not None

    @property
    def pastes(self) -> bool:
        """Whether pictures are pasted into those that they began with."""
        return self.keep_unmasked or self.padding_mask_crop is not None

    @model_validator(mode="after")
    def _seeds_are_in_range(self) -> Self:
        seeds = self.image_seeds()
        for seed in (min(seeds), max(seeds)):
            if not 0 <= seed < MOST_SEED:
                raise ValueError(f"an image would have the seed {seed}: seeds go from 0 to 2⁶³ - 1")
        return self

    @model_validator(mode="after")
    def _prompts_have_what_they_may(self) -> Self:
        known = own_settings()
        for name in {name for prompt in self.prompts for name in prompt.settings}:
            if name not in known:
                raise ValueError(f"a prompt cannot have {name} of its own")
        begins = self.has_pictures or self.init_latents is not None
        if begins and any(prompt.settings.keys() & {"height", "width"} for prompt in self.prompts):
            raise ValueError(
                "a run that begins with pictures or latents has one size: leave height and width "
                "out of its prompts"
            )
        return self

    def images_of_prompts(self) -> list[int]:
        """How many images each prompt has."""
        return images_of(self.prompts, self.num_images_per_prompt)

    def prompt_of_images(self) -> list[int]:
        """The prompt of every image, prompt-major."""
        return [prompt for prompt, own in enumerate(self.images_of_prompts()) for _ in range(own)]

    def image_seeds(self) -> list[int]:
        """The seed of every image, prompt-major."""
        return seeds_of(self.prompts, self.images_of_prompts(), self)

    @property
    def seeds_count_places(self) -> bool:
        """Whether an image has another seed where its prompt moves."""
        by_place = any(not prompt.has_own_seed and prompt.id is None for prompt in self.prompts)
        return by_place and not self.same_seed

    def override(self, changes: Mapping[str, Any]) -> tuple[Self, dict[str, list[Any]]]:
        """Apply one stage's flags. Returns the new settings, and what differs: before and after."""
        unknown = changes.keys() - type(self).model_fields.keys()
        if unknown:
            raise BadSettingError(f"not a setting of a run: {', '.join(sorted(unknown))}")
        merged = merge_settings(self.model_dump(), changes, "flags")
        changed = validate(type(self), merged, "flags")
        before, after = (settings.model_dump(mode="json") for settings in (self, changed))
        return changed, {
            name: [before[name], value] for name, value in after.items() if before[name] != value
        }


def read_run_settings(config_file: Path | None, flags: Mapping[str, Any]) -> RunSettings:
    """Merge the built-in defaults, a YAML file and the flags that were given.

    `flags` holds only flags that were given. A `prompt` flag replaces the file's `prompts_file`
    and the reverse.

    Raises:
        BadSettingError: an unknown key or a bad value; names the file or the flag.
        BadInputFileError: the file is missing or is not YAML.
    """
    values: dict[str, Any] = {}
    if config_file is not None:
        values = _read_yaml(config_file)
        if "prompt" in values and "prompts_file" in values:
            raise BadSettingError(f"{config_file}: give either prompt or prompts_file, not both")
        values = merge_settings({}, values, str(config_file))
        validate(RunSettings, values, str(config_file))
    if "prompt" in flags and "prompts_file" in flags:
        raise BadSettingError("give either --prompt or --prompts_file, not both")
    if "prompt" in flags:
        values.pop("prompts_file", None)
    return validate(RunSettings, merge_settings(values, flags, "flags"), "flags")


def resolve(settings: RunSettings, *, native_size: int, size_factor: int) -> GenerationConfig:
    """Decide everything that was left open: prompts, their negatives, the size.

    Args:
        native_size: the checkpoint's own height and width in pixels.
        size_factor: what height and width must be multiples of, in pixels.
    """
    if settings.prompts_file is not None:
        prompts = read_prompts_file(settings.prompts_file, settings)
    else:
        prompts = make_prompts(settings)
    prompts = with_inputs(with_combinations(prompts, settings), settings)
    if not prompts:
        raise BadSettingError("no prompt: give --prompt, --prompts_file or a config with one")
    shared = settings.model_dump(include=set(_Shared.model_fields))
    begun = size_of_pictures(prompts, settings, size_factor)
    own = begun or size_of_latents(settings, size_factor) or (native_size, native_size)
    size = {"height": settings.height or own[0], "width": settings.width or own[1]}
    config = validate(GenerationConfig, {"prompts": prompts, **size, **shared}, "flags")
    check_size(config, size_factor)
    return config


def check_size(config: GenerationConfig, size_factor: int, said: str = "--") -> None:
    """Raise `BadSettingError` where height or width is not a multiple of `size_factor`.

    Args:
        said: what the error says before the setting's name.
    """
    for name in ("height", "width"):
        value = getattr(config, name)
        if value % size_factor:
            below = value // size_factor * size_factor
            choice = f"{below} or {below + size_factor}" if below else str(size_factor)
            raise BadSettingError(
                f"{said}{name} {value} is not a multiple of {size_factor}, which the checkpoint "
                f"{config.model_id} needs: use {choice}"
            )


def read_generation_config(run_dir: Path) -> GenerationConfig:
    """Read a run directory's `generation_config.json`.

    Raises:
        BadInputFileError: the file is missing, damaged, or holds a bad setting.
    """
    path = run_dir / GENERATION_CONFIG_FILE
    mend = "run stage 1 to make it: python stages/stage1_text_encoder.py"
    try:
        values = parse_json(read_text(path))
    except FileNotFoundError:
        raise BadInputFileError(f"{path} is missing; {mend} --output_dir {run_dir}") from None
    except (OSError, ValueError) as error:
        raise BadInputFileError(f"{path} is damaged ({error}); {mend}") from None
    try:
        return validate(GenerationConfig, values, str(path))
    except BadSettingError as error:
        raise BadInputFileError(f"{error}; {mend}") from None


def write_generation_config(run_dir: Path, config: GenerationConfig) -> None:
    """Write `generation_config.json`; the same settings leave the file untouched."""
    path = run_dir / GENERATION_CONFIG_FILE
    text = config.model_dump_json(indent=2) + "\n"
    try:
        if read_text(path) == text:
            return
    except (OSError, ValueError):
        pass  # there is none, or a damaged one
    write_text_whole(path, text)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = read_text(path, MOST_YAML_BYTES)
    except FileNotFoundError:
        raise BadInputFileError(f"--config {path} does not exist") from None
    except (OSError, ValueError) as error:
        raise BadInputFileError(f"--config {path} cannot be read: {error}") from None
    try:
        values = parse_yaml(text)
    except ValueError as error:
        raise BadInputFileError(f"--config {path} is not YAML of plain values: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise BadSettingError(f"--config {path} must hold one mapping of settings to values")
    return values
