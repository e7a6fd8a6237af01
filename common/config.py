"""The settings of a run: their names, defaults and bounds, and the order in which they are decided.

Built-in default < `--config` file < flags. Stage 1 resolves them into `generation_config.json`;
stages 2 and 3 read that file and may override single settings for one run of theirs.
"""

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from common.errors import BadInputFileError, BadSettingError
from common.whole_files import write_text_whole

PROJECT_DIR = Path(__file__).resolve().parent.parent
DEFAULT_OUTPUT_DIR = Path("stage_outputs")
GENERATION_CONFIG_FILE = "generation_config.json"

Dtype = Literal["float32", "bfloat16"]
DeviceDtype = Literal["auto", "float32", "bfloat16"]
ImageFormat = Literal["png", "webp", "jpg"]
Model = TypeVar("Model", bound=BaseModel)

# Names as in the ecosystem; a diffusers class name works too.
SCHEDULERS = {
    "euler": "EulerDiscreteScheduler",
    "ddim": "DDIMScheduler",
}


class PromptSettings(BaseModel):
    """One prompt of a run. `negative_prompt` None means what diffusers does with `None`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str
    negative_prompt: str | None
    seed: int | None = Field(default=None, ge=0, lt=2**63)


class SamplingSettings(BaseModel):
    """Settings that mean the same before and after they are resolved."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model_id: str = "models/demo"
    num_images_per_prompt: int = Field(default=1, ge=1)
    num_inference_steps: int = Field(default=25, ge=1)
    guidance_scale: float = Field(default=7.5, ge=0)
    seed: int = Field(default=42, ge=0, lt=2**63)
    scheduler: str | None = None  # None: the checkpoint's own
    text_encoder_dtype: Dtype = "float32"
    unet_dtype: DeviceDtype = "auto"  # bfloat16 on TPU and GPU, float32 on CPU
    vae_dtype: DeviceDtype = "auto"  # float32 where the VAE says `force_upcast`, else as the UNet
    image_format: ImageFormat = "png"

    @field_validator("scheduler")
    @classmethod
    def _known_scheduler(cls, name: str | None) -> str | None:
        if name is None or name in SCHEDULERS or name in SCHEDULERS.values():
            return name
        raise ValueError(f"use {', '.join(SCHEDULERS)} or the diffusers class name of one")

    def scheduler_class(self, own: str) -> str:
        """The diffusers class of the scheduler; `own` is the checkpoint's."""
        return own if self.scheduler is None else SCHEDULERS.get(self.scheduler, self.scheduler)


class RunSettings(SamplingSettings):
    """Settings as they are asked for, in a `--config` file or by flags."""

    prompt: tuple[str, ...] = ("a large red star on a blue background",)
    prompts_file: Path | None = None
    negative_prompt: str | None = "blurry, low quality, distorted, deformed"
    height: int | None = Field(default=None, ge=8)  # None: the checkpoint's own size
    width: int | None = Field(default=None, ge=8)

    @model_validator(mode="before")
    @classmethod
    def _one_prompt_is_a_list_of_one(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("prompt"), str):
            return {**values, "prompt": [values["prompt"]]}
        return values


class GenerationConfig(SamplingSettings):
    """Every setting of a run, resolved: the content of `generation_config.json`."""

    prompts: tuple[PromptSettings, ...] = Field(min_length=1)
    height: int = Field(ge=8)
    width: int = Field(ge=8)

    def image_seeds(self) -> list[int]:
        """The seed of every image, prompt-major: the prompt's own + k, or the run's + index."""
        seeds: list[int] = []
        for prompt in self.prompts:
            for k in range(self.num_images_per_prompt):
                own = None if prompt.seed is None else prompt.seed + k
                seeds.append(self.seed + len(seeds) if own is None else own)
        return seeds

    def override(self, changes: Mapping[str, Any]) -> tuple[Self, list[str]]:
        """Apply one stage's flags. Returns the new settings and a line for each that differs."""
        unknown = changes.keys() - type(self).model_fields.keys()
        if unknown:
            raise BadSettingError(f"not a setting of a run: {', '.join(sorted(unknown))}")
        lines = [
            f"{name} {getattr(self, name)} → {value}"
            for name, value in changes.items()
            if getattr(self, name) != value
        ]
        return _validate(type(self), {**self.model_dump(), **changes}, "flags"), lines


class RunOptions(BaseModel):
    """How a stage computes, which changes nothing in what it computes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mesh: str = "single"
    batch_size: int = Field(default=8, ge=1)
    steps_per_call: int | None = Field(default=None, ge=1)  # None: 1 on CPU, else all
    warmup_steps: int = Field(default=0, ge=0)
    warmup: bool = False


def read_run_options(parameters: Mapping[str, Any]) -> RunOptions:
    """Pick a stage's run options out of its command's parameters.

    Raises:
        BadSettingError: a bad value; names the flag.
    """
    names = RunOptions.model_fields.keys()
    given = {name: value for name, value in parameters.items() if name in names}
    return _validate(RunOptions, {k: v for k, v in given.items() if v is not None}, "flags")


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
        _validate(RunSettings, values, str(config_file))
    if "prompt" in flags and "prompts_file" in flags:
        raise BadSettingError("give either --prompt or --prompts_file, not both")
    if "prompt" in flags:
        values.pop("prompts_file", None)
    return _validate(RunSettings, {**values, **flags}, "flags")


def resolve(settings: RunSettings, *, native_size: int, size_factor: int) -> GenerationConfig:
    """Decide everything that was left open: prompts, their negatives, the size.

    Args:
        native_size: the checkpoint's own height and width in pixels.
        size_factor: what height and width must be multiples of, in pixels.
    """
    if settings.prompts_file is not None:
        prompts = read_prompts_file(settings.prompts_file, settings.negative_prompt)
    else:
        prompts = tuple(
            PromptSettings(prompt=prompt, negative_prompt=settings.negative_prompt)
            for prompt in settings.prompt
        )
    if not prompts:
        raise BadSettingError("no prompt: give --prompt, --prompts_file or a config with one")
    shared = settings.model_dump(include=set(SamplingSettings.model_fields))
    config = GenerationConfig(
        prompts=prompts,
        height=settings.height or native_size,
        width=settings.width or native_size,
        **shared,
    )
    check_size(config, size_factor)
    return config


def check_size(config: GenerationConfig, size_factor: int) -> None:
    """Raise `BadSettingError` where height or width is not a multiple of `size_factor`."""
    for name in ("height", "width"):
        value = getattr(config, name)
        if value % size_factor:
            below = value // size_factor * size_factor
            choice = f"{below} or {below + size_factor}" if below else str(size_factor)
            raise BadSettingError(
                f"--{name} {value} is not a multiple of {size_factor}, which the checkpoint "
                f"{config.model_id} needs: use {choice}"
            )


def read_prompts_file(path: Path, negative_prompt: str | None) -> tuple[PromptSettings, ...]:
    """Read one prompt a line, or JSON objects where the name ends in `.jsonl`.

    A JSON line has `prompt` and may have `negative_prompt` (null: none) and `seed`; without its
    own, a prompt has the run's `negative_prompt`. Blank lines are passed over.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise BadInputFileError(f"--prompts_file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputFileError(f"--prompts_file {path} cannot be read: {error}") from None
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        values: Any = {"prompt": line.strip()}
        if path.suffix == ".jsonl":
            try:
                values = json.loads(line)
            except json.JSONDecodeError as error:
                raise BadSettingError(f"{path}, line {number} is not JSON: {error}") from None
            if not isinstance(values, dict):
                raise BadSettingError(f"{path}, line {number} is not a JSON object")
        values = {"negative_prompt": negative_prompt, **values}
        prompts.append(_validate(PromptSettings, values, f"{path}, line {number}"))
    if not prompts:
        raise BadSettingError(f"--prompts_file {path} holds no prompt: write one a line")
    return tuple(prompts)


def read_generation_config(run_dir: Path) -> GenerationConfig:
    """Read a run directory's `generation_config.json`.

    Raises:
        BadInputFileError: the file is missing, damaged, or holds a bad setting.
    """
    path = run_dir / GENERATION_CONFIG_FILE
    mend = "run stage 1 to make it: python stages/stage1_text_encoder.py"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInputFileError(f"{path} is missing; {mend} --output_dir {run_dir}") from None
    except (OSError, ValueError) as error:
        raise BadInputFileError(f"{path} is damaged ({error}); {mend}") from None
    try:
        return _validate(GenerationConfig, values, str(path))
    except BadSettingError as error:
        raise BadInputFileError(f"{error}; {mend}") from None


def write_generation_config(run_dir: Path, config: GenerationConfig) -> None:
    """Write `generation_config.json`; the same settings leave the file untouched."""
    path = run_dir / GENERATION_CONFIG_FILE
    text = config.model_dump_json(indent=2) + "\n"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_text_whole(path, text)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInputFileError(f"--config {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputFileError(f"--config {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        where = " ".join(str(error).split())
        raise BadInputFileError(f"--config {path} is not YAML: {where}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise BadSettingError(f"--config {path} must hold one mapping of settings to values")
    return values


def _validate(model: type[Model], values: Any, source: str) -> Model:
    """Build a model, or raise one sentence about the first thing that is wrong in `source`."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"]) or "settings"
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, model.model_fields, n=1, cutoff=0)
        raise BadSettingError(f"{source}: unknown setting {name!r}; did you mean {near[0]!r}?")
    what = f"--{name}" if source == "flags" else f"{source}: {name}"
    if first["type"] == "missing":
        raise BadSettingError(f"{what} is missing")
    reason = first["msg"].removeprefix("Value error, ")
    reason = reason[0].lower() + reason[1:]
    raise BadSettingError(f"{what} {first['input']!r}: {reason}")
