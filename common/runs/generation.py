"""The settings of a run: their names, defaults and bounds, and the order in which they are decided.

Built-in default < `--config` file < flags. Stage 1 resolves them into `generation_config.json`;
stages 2 and 3 read that file and may override single settings for one run of theirs.
"""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from common.errors import BadInputFileError, BadSettingError, shorten
from common.sampling.sampler import SCHEDULER_CLASSES, SCHEDULERS, scheduler_choice
from common.text_files import MOST_YAML_BYTES, parse_json, parse_yaml, read_text
from common.whole_files import write_text_whole

PROJECT_DIR = Path(__file__).resolve().parents[2]
DEFAULT_OUTPUT_DIR = Path("stage_outputs")
GENERATION_CONFIG_FILE = "generation_config.json"

# Bounds that no run comes near, so that a wrong number is refused before it takes memory.
MOST_PIXELS = 16_384  # a side
MOST_STEPS = 10_000
MOST_IMAGES_PER_PROMPT = 10_000
Pixels = Annotated[int, Field(ge=-1_000_000, le=1_000_000)]

Dtype = Literal["float32", "bfloat16"]
DeviceDtype = Literal["auto", "float32", "bfloat16"]
ImageFormat = Literal["png", "webp", "jpg"]
Model = TypeVar("Model", bound=BaseModel)


def _is_unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("it holds bytes that are no UTF-8 text") from None
    return text


def _names_a_place(text: str) -> str:
    if not text:
        raise ValueError("it is empty: leave it out, or give a name")
    if "\0" in text:
        raise ValueError("give a name without NUL characters")
    return text


Text = Annotated[str, AfterValidator(_is_unicode)]
Place = Annotated[Text, AfterValidator(_names_a_place)]  # a path or a hub id
SIZE_CONDITIONS = tuple(
    f"{sign}{name}"
    for sign in ("", "negative_")
    for name in ("original_size", "crops_coords_top_left", "target_size")
)
# Flags that give one of several, by the settings that hold all of them.
FLAG_OF_SETTING = {
    "embeddings": "embedding",
    "loras": "lora",
    "scheduler_options": "scheduler_option",
}
# Each of them says how many steps there are: giving one takes the place of the others.
STEP_SETTINGS = ("num_inference_steps", "timesteps", "sigmas")


class TokenFile(BaseModel):
    """A textual inversion: a safetensors file and the word that stands for it in prompts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: Place
    token: Text = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        """`FILE` or `FILE:TOKEN`; the token is the file's name unless given."""
        if not isinstance(value, str):
            return value
        file, colon, token = value.rpartition(":")
        if not colon or "/" in token or token.endswith(".safetensors"):
            file, token = value, Path(value).stem
        return {"file": file, "token": token}


class LoraFile(BaseModel):
    """A LoRA: a safetensors file and how much of it is added."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    file: Place
    scale: float = 1.0

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        """`FILE` or `FILE:SCALE`."""
        if not isinstance(value, str):
            return value
        file, colon, scale = value.rpartition(":")
        if colon and re.fullmatch(r"-?[\d.]+(e-?\d+)?", scale):
            return {"file": file, "scale": scale}
        return {"file": value}


class PromptSettings(BaseModel):
    """One prompt of a run. `negative_prompt` None means what diffusers does with `None`.

    Those for the second text encoder are those for the first where they are None.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: Text
    prompt_2: Text | None = None
    negative_prompt: Text | None
    negative_prompt_2: Text | None = None
    seed: int | None = Field(default=None, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _second_negative_needs_the_first(self) -> Self:
        if self.negative_prompt_2 is not None and self.negative_prompt is None:
            raise ValueError("negative_prompt_2 needs a negative_prompt, as diffusers reads them")
        return self


class ModelSettings(BaseModel):
    """Which checkpoint is read: a folder, a hub id or one file, and what replaces its parts."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model_id: Place = "models/demo"
    revision: Place | None = None  # of a hub id
    variant: str | None = Field(default=None, pattern=r"^[\w-]+$")  # of the weights, as fp16
    single_file_config: Place | None = None  # folder or hub id with the configs of a single file
    unet: Place | None = None  # folder, hub id or file of another UNet
    vae: Place | None = None  # likewise of another VAE

    def model_settings(self) -> dict[str, str]:
        """Which checkpoint is read, by those of these settings that are given."""
        values = {name: getattr(self, name) for name in ModelSettings.model_fields}
        return {name: value for name, value in values.items() if value is not None}


class SamplingSettings(ModelSettings):
    """Settings that mean the same before and after they are resolved."""

    num_images_per_prompt: int = Field(default=1, ge=1, le=MOST_IMAGES_PER_PROMPT)
    clip_skip: int | None = Field(default=None, ge=1)
    long_prompts: Literal["cut", "chunk"] = "cut"  # over 77 tokens: cut off, or encoded in chunks
    prompt_weighting: Literal["compel"] | None = None  # the library whose syntax prompts are in
    embeddings: tuple[TokenFile, ...] = ()  # textual inversions
    loras: tuple[LoraFile, ...] = ()
    # SDXL's size conditions, (height, width) and (top, left) in pixels; None: diffusers' defaults.
    original_size: tuple[Pixels, Pixels] | None = None
    target_size: tuple[Pixels, Pixels] | None = None
    crops_coords_top_left: tuple[Pixels, Pixels] = (0, 0)
    negative_original_size: tuple[Pixels, Pixels] | None = None
    negative_target_size: tuple[Pixels, Pixels] | None = None
    negative_crops_coords_top_left: tuple[Pixels, Pixels] = (0, 0)
    # None: by timesteps or sigmas.
    num_inference_steps: int | None = Field(default=25, ge=1, le=MOST_STEPS)
    timesteps: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...] | None = Field(
        default=None, min_length=1, max_length=MOST_STEPS
    )
    sigmas: tuple[float, ...] | None = Field(default=None, min_length=1, max_length=MOST_STEPS)
    guidance_scale: float = Field(default=7.5, ge=0)
    guidance_rescale: float = Field(default=0.0, ge=0, le=1)
    # Shares of the model evaluations: guided from the first to before the second.
    guidance_start: float = Field(default=0.0, ge=0, le=1)
    guidance_end: float = Field(default=1.0, ge=0, le=1)
    seed: int = Field(default=42, ge=0, lt=2**63)
    scheduler: str | None = None  # None: the checkpoint's own
    scheduler_options: dict[str, Any] = Field(default_factory=dict)
    eta: float = Field(default=0.0, ge=0)  # of DDIM and TCD, as diffusers' pipelines hand it on
    text_encoder_dtype: Dtype = "float32"
    unet_dtype: DeviceDtype = "auto"  # bfloat16 on TPU and GPU, float32 on CPU
    vae_dtype: DeviceDtype = "auto"  # float32 where the VAE says `force_upcast`, else as the UNet
    tile: bool = False  # decode large pictures in overlapping tiles, as diffusers' `enable_tiling`
    image_format: ImageFormat = "png"

    @field_validator("scheduler")
    @classmethod
    def _known_scheduler(cls, name: str | None) -> str | None:
        if name is None or name in SCHEDULERS or name in SCHEDULER_CLASSES:
            return name
        near = difflib.get_close_matches(name, [*SCHEDULERS, *SCHEDULER_CLASSES], n=1, cutoff=0)
        raise ValueError(
            f"did you mean {near[0]!r}? There are {', '.join(SCHEDULERS)}, and their diffusers "
            "class names"
        )

    @field_validator("timesteps", "sigmas", *SIZE_CONDITIONS, mode="before")
    @classmethod
    def _list_in_a_flag(cls, value: Any, info: ValidationInfo) -> Any:
        numbers = value.split(",") if isinstance(value, str) else value
        is_list = isinstance(numbers, list | tuple)
        if info.field_name in SIZE_CONDITIONS and is_list and len(numbers) != 2:
            raise ValueError("give two numbers of pixels, as 1024,1024")
        return numbers

    @field_validator("scheduler_options")
    @classmethod
    def _options_fit_into_json(cls, options: dict[str, Any]) -> dict[str, Any]:
        try:
            json.dumps(options, allow_nan=False, ensure_ascii=False).encode()
        except (TypeError, ValueError, RecursionError):
            raise ValueError("give finite numbers, words, true, false or null") from None
        return options

    @model_validator(mode="after")
    def _guidance_starts_before_it_ends(self) -> Self:
        if self.guidance_start > self.guidance_end:
            raise ValueError(
                f"guidance_start {self.guidance_start} is after guidance_end {self.guidance_end}"
            )
        return self

    @model_validator(mode="after")
    def _one_way_to_say_the_steps(self) -> Self:
        given = [name for name in STEP_SETTINGS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(STEP_SETTINGS)}, not {len(given)} of them")
        return self

    def scheduler_choice(self, own: str) -> tuple[str, dict[str, Any]]:
        """diffusers' class of the scheduler and its options; `own` is the checkpoint's class."""
        return scheduler_choice(self.scheduler, self.scheduler_options, own)


class RunSettings(SamplingSettings):
    """Settings as they are asked for, in a `--config` file or by flags."""

    prompt: tuple[Text, ...] = ("a large red star on a blue background",)
    prompts_file: Path | None = None
    prompt_2: tuple[Text, ...] | None = None  # one for all prompts, or one for each
    negative_prompt: Text | None = "blurry, low quality, distorted, deformed"
    negative_prompt_2: Text | None = None
    # None: the checkpoint's own size.
    height: int | None = Field(default=None, ge=8, le=MOST_PIXELS)
    width: int | None = Field(default=None, ge=8, le=MOST_PIXELS)

    @model_validator(mode="before")
    @classmethod
    def _one_is_a_list_of_one(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        lists = ("prompt", "prompt_2", "embeddings", "loras")
        single = {name: [values[name]] for name in lists if isinstance(values.get(name), str)}
        return {**values, **single}


class GenerationConfig(SamplingSettings):
    """Every setting of a run, resolved: the content of `generation_config.json`."""

    prompts: tuple[PromptSettings, ...] = Field(min_length=1)
    height: int = Field(ge=8, le=MOST_PIXELS)
    width: int = Field(ge=8, le=MOST_PIXELS)

    def image_seeds(self) -> list[int]:
        """The seed of every image, prompt-major: the prompt's own + k, or the run's + index."""
        seeds: list[int] = []
        for prompt in self.prompts:
            for k in range(self.num_images_per_prompt):
                own = None if prompt.seed is None else prompt.seed + k
                seeds.append(self.seed + len(seeds) if own is None else own)
        return seeds

    def prompt_settings(self) -> dict[str, Any]:
        """The settings of the prompts that determine their embeddings."""
        return {
            "prompts": [prompt.prompt for prompt in self.prompts],
            "prompts_2": [prompt.prompt_2 for prompt in self.prompts],
            "negative_prompts": [prompt.negative_prompt for prompt in self.prompts],
            "negative_prompts_2": [prompt.negative_prompt_2 for prompt in self.prompts],
            "clip_skip": self.clip_skip,
            "long_prompts": self.long_prompts,
            "prompt_weighting": self.prompt_weighting,
            "text_encoder_dtype": self.text_encoder_dtype,
        }

    def override(self, changes: Mapping[str, Any]) -> tuple[Self, list[str]]:
        """Apply one stage's flags. Returns the new settings and a line for each that differs."""
        unknown = changes.keys() - type(self).model_fields.keys()
        if unknown:
            raise BadSettingError(f"not a setting of a run: {', '.join(sorted(unknown))}")
        before = self.model_dump()
        changed = _validate(type(self), merge_settings(before, changes, "flags"), "flags")
        after = changed.model_dump()
        lines = [
            f"{name} {before[name]} → {value}"
            for name, value in after.items()
            if before[name] != value
        ]
        return changed, lines


def merge_settings(
    lower: Mapping[str, Any], upper: Mapping[str, Any], source: str
) -> dict[str, Any]:
    """Lay settings over others, those that exclude or belong to each other together.

    A way of giving the steps (`STEP_SETTINGS`) takes the place of another way; another scheduler
    takes its predecessor's options away, options alone are added to those before.

    Raises:
        BadSettingError: `upper` gives the steps in two ways; names `source`.
    """
    given = [name for name in STEP_SETTINGS if upper.get(name) is not None]
    if len(given) > 1:
        raise BadSettingError(f"{source}: give either {' or '.join(given)}, not both")
    merged = {**lower, **upper}
    if given:
        merged |= {name: None for name in STEP_SETTINGS if name != given[0]}
    if upper.get("scheduler", lower.get("scheduler")) != lower.get("scheduler"):
        merged["scheduler_options"] = upper.get("scheduler_options", {})
    elif isinstance(upper.get("scheduler_options"), dict):
        before = lower.get("scheduler_options", {})
        merged["scheduler_options"] = {**before, **upper["scheduler_options"]}
    return merged


def _parse_value(text: str) -> Any:
    """A value as YAML writes it; 1e-2 is a number as well."""
    value = parse_yaml(text)
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def parse_scheduler_options(items: Sequence[str]) -> dict[str, Any]:
    """Read `key=value` flags, with each value as YAML writes it.

    Raises:
        BadSettingError: an item is not of this form.
    """
    options = {}
    for item in items:
        key, equals, text = item.partition("=")
        try:
            if not equals or not key:
                raise ValueError("no =")
            options[key.replace("-", "_")] = _parse_value(text)
        except ValueError:
            raise BadSettingError(
                f"--scheduler_option {item}: give key=value, such as use_karras_sigmas=true"
            ) from None
    return options


class RunOptions(BaseModel):
    """How a stage computes, which changes nothing in what it computes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    backend: Literal["auto", "jax", "torch"] = "auto"
    mesh: str = "auto"
    batch_size: int = Field(default=8, ge=1)
    steps_per_call: int | None = Field(default=None, ge=1)  # None: 1 on CPU, else all
    warmup_steps: int = Field(default=0, ge=0)
    warmup: bool = False
    operations: Literal["fast", "torchax"] = "fast"
    distributed: str | None = None
    repeat: int = Field(default=0, ge=0)
    profile: bool = False
    profile_dir: Path | None = None  # None: profile/ in the run directory
    profile_steps: tuple[int, int] | None = None  # None: some warm ones
    save_trajectory: int | None = Field(default=None, ge=1)
    checkpoint_every: int | None = Field(default=None, ge=1)  # None: by time
    no_verify: bool = False

    @field_validator("profile_steps", mode="before")
    @classmethod
    def _parse_steps(cls, value: Any) -> Any:
        """Read "5:8"."""
        if not isinstance(value, str):
            return value
        match = re.fullmatch(r"(\d+):(\d+)", value)
        if match is None or int(match[1]) >= int(match[2]):
            raise ValueError("give the first step and the one after the last, as 5:8")
        return int(match[1]), int(match[2])

    @model_validator(mode="before")
    @classmethod
    def _profile_where_it_is_placed(cls, values: Any) -> Any:
        """A folder or steps for a profile ask for one."""
        named = values.get("profile_dir") or values.get("profile_steps")
        return values | {"profile": True} if named else values

    def given(self) -> list[str]:
        """The options that are not as they are by default."""
        defaults = RunOptions()
        names = type(self).model_fields
        return [name for name in names if getattr(self, name) != getattr(defaults, name)]

    def writes(self) -> bool:
        """Whether this process is known to write: it is alone, or the first of several."""
        return self.distributed is None or self.distributed.endswith(",0")

    def why_measure(self) -> str | None:
        """Why a stage runs although its output is fresh; None if nothing is to be measured."""
        if self.profile:
            return "it is to be profiled"
        return "it is to be repeated" if self.repeat else None

    def profile_folder(self, run_dir: Path, stage: int) -> Path:
        """Where a stage's trace is written."""
        return (self.profile_dir or run_dir / "profile") / f"stage{stage}"

    def profiled_steps(self, evaluations: int) -> range:
        """The steps to profile: those asked for, else up to three after the first two.

        Raises:
            BadSettingError: the run has no such steps.
        """
        if self.profile_steps is None:
            first = min(2, evaluations - 1)
            return range(first, min(first + 3, evaluations))
        if self.profile_steps[1] > evaluations:
            first, stop = self.profile_steps
            raise BadSettingError(
                f"--profile_steps {first}:{stop}: the run has {evaluations} steps, 0 to "
                f"{evaluations - 1}"
            )
        return range(*self.profile_steps)


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
        values = merge_settings({}, values, str(config_file))
        _validate(RunSettings, values, str(config_file))
    if "prompt" in flags and "prompts_file" in flags:
        raise BadSettingError("give either --prompt or --prompts_file, not both")
    if "prompt" in flags:
        values.pop("prompts_file", None)
    return _validate(RunSettings, merge_settings(values, flags, "flags"), "flags")


def resolve(settings: RunSettings, *, native_size: int, size_factor: int) -> GenerationConfig:
    """Decide everything that was left open: prompts, their negatives, the size.

    Args:
        native_size: the checkpoint's own height and width in pixels.
        size_factor: what height and width must be multiples of, in pixels.
    """
    if settings.prompts_file is not None:
        prompts = read_prompts_file(settings.prompts_file, settings)
    else:
        prompts = _make_prompts(settings)
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


def _make_prompts(settings: RunSettings) -> tuple[PromptSettings, ...]:
    seconds: Sequence[str | None] = settings.prompt_2 or (None,)
    if len(seconds) not in (1, len(settings.prompt)):
        raise BadSettingError(
            f"--prompt_2 is given {len(seconds)} times for {len(settings.prompt)} prompts: give it "
            "once for all, or once for each"
        )
    if len(seconds) == 1:
        seconds = [seconds[0]] * len(settings.prompt)
    return tuple(
        _validate(
            PromptSettings,
            {
                "prompt": prompt,
                "prompt_2": second,
                "negative_prompt": settings.negative_prompt,
                "negative_prompt_2": settings.negative_prompt_2,
            },
            "the settings",
        )
        for prompt, second in zip(settings.prompt, seconds, strict=True)
    )


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


def read_prompts_file(path: Path, settings: RunSettings) -> tuple[PromptSettings, ...]:
    """Read one prompt a line, or JSON objects where the name ends in `.jsonl`.

    A JSON line has `prompt` and may have `prompt_2`, `negative_prompt` (null: none),
    `negative_prompt_2` and `seed`; without its own, a prompt has the run's negative prompts. Blank
    lines are passed over.
    """
    if settings.prompt_2 is not None:
        raise BadSettingError(
            f"give either --prompt_2 or --prompts_file, not both: {path} can hold prompt_2"
        )
    try:
        lines = read_text(path).splitlines()
    except FileNotFoundError:
        raise BadInputFileError(f"--prompts_file {path} does not exist") from None
    except (OSError, ValueError) as error:
        raise BadInputFileError(f"--prompts_file {path} cannot be read: {error}") from None
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        values: Any = {"prompt": line.strip()}
        if path.suffix == ".jsonl":
            try:
                values = parse_json(line)
            except ValueError as error:
                raise BadSettingError(f"{path}, line {number} is not JSON: {error}") from None
            if not isinstance(values, dict):
                raise BadSettingError(f"{path}, line {number} is not a JSON object")
        if "negative_prompt" not in values:
            values["negative_prompt"] = settings.negative_prompt
            values.setdefault("negative_prompt_2", settings.negative_prompt_2)
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
        values = parse_json(read_text(path))
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


def _validate(model: type[Model], values: Any, source: str) -> Model:
    """Build a model, or raise one sentence about the first thing that is wrong in `source`."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    reason = first["msg"].removeprefix("Value error, ")
    reason = reason[0].lower() + reason[1:]
    if not name:
        raise BadSettingError(f"{source}: {reason}")
    if first["type"] == "extra_forbidden" and len(first["loc"]) == 1:
        near = difflib.get_close_matches(name, model.model_fields, n=1, cutoff=0)
        raise BadSettingError(f"{source}: unknown setting {name!r}; did you mean {near[0]!r}?")
    flag = FLAG_OF_SETTING.get(str(first["loc"][0]), first["loc"][0])
    what = f"--{flag}" if source == "flags" else f"{source}: {name}"
    if first["type"] == "missing":
        raise BadSettingError(f"{what} is missing")
    raise BadSettingError(f"{what} {shorten(repr(first['input']), 60)}: {reason}")
