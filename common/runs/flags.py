"""What all scripts share on the command line: flags, messages, errors and exit codes."""

import atexit
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand
from typer.exceptions import TyperException

from common.compute.profile_tables import lines_of
from common.errors import (
    OUT_OF_DEVICE_MEMORY,
    BadSettingError,
    StageError,
    in_one_line,
    shorten,
    without_controls,
)
from common.files.report import Profile as ProfileReport
from common.files.report import Repeat as RepeatReport
from common.files.report import StageReport
from common.models.hub import OFFLINE
from common.runs.generation import (
    DEFAULT_OUTPUT_DIR,
    FLAG_OF_SETTING,
    GenerationConfig,
    RunOptions,
    RunSettings,
    parse_scheduler_options,
)
from common.stopping import stop_at_once_on_signals

LESS_MEMORY = (
    "ask for fewer pictures at once (--batch_size), a smaller size, a --mesh over more devices, or "
    "--tile in stage 3"
)
PROMPTS, SIZES, SAMPLING = "Prompts", "Size conditions of SDXL", "Sampling"
MODEL, FILES, RUNNING, TPU = "Model", "Files", "Running", "A TPU that is not there"


def flag(
    name: str, metavar: str, group: str, text: str, callback: Callable[..., Any] | None = None
) -> Any:
    """Declare a flag: its name, what it takes, its group in the help, its meaning in one line."""
    # The help is rich markup, in which a bracket must be escaped.
    return typer.Option(
        f"--{name}",
        metavar=metavar,
        rich_help_panel=group,
        help=text.replace("[", r"\["),
        show_default=False,
        callback=callback,
    )


def _keep_offline(offline: bool) -> bool:
    """Forbid the network to the hub's library, which reads this when it is imported."""
    if offline:
        os.environ[OFFLINE] = "1"
    return offline


def _setting(name: str, metavar: str, group: str, text: str) -> Any:
    """A flag of a run's setting, with its default in brackets."""
    return flag(name, metavar, group, f"{text} [{RunSettings.model_fields[name].default}]")


def _option(name: str, metavar: str, text: str) -> Any:
    """A flag of a run option, with its default in brackets."""
    return flag(name, metavar, RUNNING, f"{text} [{RunOptions.model_fields[name].default}]")


# Prompts
Prompt = Annotated[
    list[str] | None, flag("prompt", "TEXT", PROMPTS, "What to draw; give it again for more.")
]
PromptsFile = Annotated[
    Path | None, flag("prompts_file", "FILE", PROMPTS, "One prompt a line, or JSONL.")
]
NegativePrompt = Annotated[
    str | None,
    flag("negative_prompt", "TEXT", PROMPTS, "What not to draw. [blurry, low …]"),
]
Prompt2 = Annotated[
    list[str] | None, flag("prompt_2", "TEXT", PROMPTS, "For the second encoder. [the prompt]")
]
NegativePrompt2 = Annotated[
    str | None, flag("negative_prompt_2", "TEXT", PROMPTS, "The same for the negative prompt.")
]
ClipSkip = Annotated[
    int | None, flag("clip_skip", "N", PROMPTS, "Layers of the encoders to leave out.")
]
LongPrompts = Annotated[
    str | None, _setting("long_prompts", "HOW", PROMPTS, "Over 77 tokens: cut, chunk.")
]
PromptWeighting = Annotated[
    str | None, flag("prompt_weighting", "HOW", PROMPTS, "Weights in prompts: compel.")
]
Embedding = Annotated[
    list[str] | None,
    flag("embedding", "FILE", PROMPTS, "Textual inversion; or FILE:TOKEN."),
]
OriginalSize = Annotated[
    str | None, flag("original_size", "H,W", SIZES, "Of the picture before its crop.")
]
TargetSize = Annotated[str | None, flag("target_size", "H,W", SIZES, "Of the picture wanted.")]
CropsCoords = Annotated[
    str | None, flag("crops_coords_top_left", "Y,X", SIZES, "The crop's corner.")
]
NegativeOriginalSize = Annotated[
    str | None, flag("negative_original_size", "H,W", SIZES, "For the unconditional half.")
]
NegativeTargetSize = Annotated[
    str | None, flag("negative_target_size", "H,W", SIZES, "Likewise; needs the one before.")
]
NegativeCropsCoords = Annotated[
    str | None, flag("negative_crops_coords_top_left", "Y,X", SIZES, "Likewise; needs both.")
]
NoNegativePrompt = Annotated[
    bool, flag("no_negative_prompt", " ", PROMPTS, 'No negative at all, unlike "".')
]
NumImagesPerPrompt = Annotated[
    int | None, _setting("num_images_per_prompt", "N", PROMPTS, "Pictures of each prompt.")
]

# Sampling
Height = Annotated[int | None, flag("height", "PIXELS", SAMPLING, "Height. [the checkpoint's own]")]
Width = Annotated[int | None, flag("width", "PIXELS", SAMPLING, "Width. [the checkpoint's own]")]
NumInferenceSteps = Annotated[
    int | None, _setting("num_inference_steps", "N", SAMPLING, "Denoising steps.")
]
GuidanceScale = Annotated[
    float | None, _setting("guidance_scale", "X", SAMPLING, "Guidance; 1 or less is none.")
]
Timesteps = Annotated[
    str | None, flag("timesteps", "N,…", SAMPLING, "The timesteps themselves, 999,749,….")
]
Sigmas = Annotated[str | None, flag("sigmas", "X,…", SAMPLING, "The sigmas themselves, 14.6,…,0.")]
GuidanceRescale = Annotated[
    float | None, _setting("guidance_rescale", "X", SAMPLING, "As in diffusers, 0 to 1.")
]
GuidanceStart = Annotated[
    float | None, _setting("guidance_start", "X", SAMPLING, "Guided from this share of steps.")
]
GuidanceEnd = Annotated[
    float | None, _setting("guidance_end", "X", SAMPLING, "Guided up to this share of steps.")
]
Seed = Annotated[int | None, _setting("seed", "N", SAMPLING, "Seed of the first picture.")]
Scheduler = Annotated[
    str | None,
    flag("scheduler", "NAME", SAMPLING, "euler_a, unipc, … [checkpoint's own]"),
]
SchedulerOption = Annotated[
    list[str] | None,
    flag("scheduler_option", "K=V", SAMPLING, "A setting of the scheduler's own."),
]
Eta = Annotated[float | None, _setting("eta", "X", SAMPLING, "Noise of DDIM and TCD, 0 to 1.")]

# Model
ModelId = Annotated[str | None, _setting("model_id", "ID", MODEL, "Folder, hub id or one file.")]
Revision = Annotated[
    str | None, flag("revision", "NAME", MODEL, "Branch, tag or commit of a hub id.")
]
Variant = Annotated[str | None, flag("variant", "NAME", MODEL, "Of the weights files, as fp16.")]
SingleFileConfig = Annotated[
    str | None, flag("single_file_config", "ID", MODEL, "Configs of a one-file model_id.")
]
Unet = Annotated[str | None, flag("unet", "ID", MODEL, "Another UNet: folder, hub id, file.")]
Vae = Annotated[str | None, flag("vae", "ID", MODEL, "Another VAE: folder, hub id, file.")]
Lora = Annotated[
    list[str] | None, flag("lora", "FILE", MODEL, "A LoRA; again for more; or FILE:SCALE.")
]
TextEncoderDtype = Annotated[
    str | None, _setting("text_encoder_dtype", "DTYPE", MODEL, "float32, bfloat16.")
]
UnetDtype = Annotated[
    str | None, _setting("unet_dtype", "DTYPE", MODEL, "float32, bfloat16, auto.")
]
VaeDtype = Annotated[str | None, _setting("vae_dtype", "DTYPE", MODEL, "float32, bfloat16, auto.")]
StageDtype = Annotated[str | None, flag("dtype", "DTYPE", MODEL, "This stage's own dtype.")]

# Files
ConfigFile = Annotated[
    Path | None, flag("config", "FILE", FILES, "YAML file of settings; flags win over it.")
]
OutputDir = Annotated[
    Path | None, flag("output_dir", "DIR", FILES, f"The run directory. [{DEFAULT_OUTPUT_DIR}]")
]
InputDir = Annotated[
    Path | None, flag("input_dir", "DIR", FILES, "Where the inputs are. [the output_dir]")
]
ImageFormatFlag = Annotated[
    str | None, _setting("image_format", "FORMAT", FILES, "png, webp, jpg.")
]

Tile = Annotated[bool | None, flag("tile", " ", MODEL, "Decode large pictures in tiles.")]

# Running
Backend = Annotated[str | None, _option("backend", "NAME", "jax, torch (on the CPU), or auto.")]
Mesh = Annotated[str | None, _option("mesh", "AXES", "single, or cfg=2,rows=4 ….")]
BatchSize = Annotated[int | None, _option("batch_size", "N", "Most pictures computed at once.")]
StepsPerCall = Annotated[
    int | None, flag("steps_per_call", "N", RUNNING, "Steps in one call. [all; 1 on CPU]")
]
WarmupSteps = Annotated[int | None, _option("warmup_steps", "N", "Steps before the timed ones.")]
Warmup = Annotated[bool, flag("warmup", " ", RUNNING, "Decode once before the timed run.")]
Operations = Annotated[str | None, _option("operations", "WHOSE", "fast (ours), torchax.")]
Distributed = Annotated[
    str | None,
    flag("distributed", "PLACE", RUNNING, "Of several: auto, or HOST:PORT,COUNT,INDEX."),
]
Topology = Annotated[
    str | None, flag("topology", "NAME", TPU, "Compile for it and do not run, as v6e:2x4.")
]
PicturesShape = Annotated[
    str | None, flag("pictures_shape", "N,H,W", TPU, "What to decode. [1, the checkpoint's own]")
]
SaveHlo = Annotated[Path | None, flag("save_hlo", "FILE", TPU, "The compiled program, as text.")]
JsonFile = Annotated[Path | None, flag("json", "FILE", TPU, "The estimate, as JSON.")]
CheckpointEvery = Annotated[
    int | None,
    flag("checkpoint_every", "N", RUNNING, "Keep progress after N steps. [by time]"),
]
Offline = Annotated[
    bool,
    flag("offline", " ", FILES, "Never use the network.", callback=_keep_offline),
]
NoVerify = Annotated[
    bool, flag("no_verify", " ", RUNNING, "Trust the checksums in the files' headers.")
]
Wait = Annotated[bool, flag("wait", " ", RUNNING, "Wait for who uses the run directory.")]
Repeat = Annotated[int | None, _option("repeat", "N", "Measure N further runs.")]
Profile = Annotated[bool, flag("profile", " ", RUNNING, "Trace warm steps, and sum them up.")]
ProfileDir = Annotated[
    Path | None, flag("profile_dir", "DIR", RUNNING, "For traces. [profile/ of the run]")
]
ProfileSteps = Annotated[
    str | None, flag("profile_steps", "A:B", RUNNING, "Trace steps A to B - 1. [2:5]")
]
SaveTrajectory = Annotated[
    int | None, flag("save_trajectory", "N", FILES, "Keep latents after every N steps.")
]
SkipFresh = Annotated[
    bool, flag("skip_fresh", " ", RUNNING, "Do nothing where the outputs are fresh.")
]
Debug = Annotated[bool, flag("debug", " ", RUNNING, "Show tracebacks and library messages.")]


def given_settings(parameters: Mapping[str, Any], stage_dtype: str | None = None) -> dict[str, Any]:
    """The settings among a command's parameters that were given, by their setting's name.

    Args:
        stage_dtype: the setting that this stage's `--dtype` stands for.
    """
    names = RunSettings.model_fields.keys()
    given = {
        name: value
        for name, value in parameters.items()
        if name in names and value is not None and value not in ([], ())
    }
    for setting, name in FLAG_OF_SETTING.items():
        if parameters.get(name):
            given[setting] = parameters[name]
    if "scheduler_options" in given:
        given["scheduler_options"] = parse_scheduler_options(given["scheduler_options"])
    if parameters.get("no_negative_prompt"):
        if "negative_prompt" in given:
            raise BadSettingError("give either --negative_prompt or --no_negative_prompt, not both")
        given["negative_prompt"] = None
    if stage_dtype is not None and parameters.get("dtype") is not None:
        if stage_dtype in given:
            raise BadSettingError(f"give either --dtype or --{stage_dtype}, not both")
        given[stage_dtype] = parameters["dtype"]
    return given


def refuse_topology_flags(parameters: Mapping[str, Any]) -> None:
    """Raise `BadSettingError` for flags that mean something only with `--topology`."""
    for name in ("pictures_shape", "save_hlo", "json"):
        if parameters.get(name) is not None:
            raise BadSettingError(f"--{name} is for --topology: give that as well, or leave it out")


def apply_overrides(
    config: GenerationConfig, parameters: Mapping[str, Any], stage_dtype: str
) -> tuple[GenerationConfig, list[str]]:
    """Override a run's settings by the flags given to one stage; with what differs, in words."""
    return config.override(given_settings(parameters, stage_dtype))


def say(text: str) -> None:
    """Print one line of a normal run."""
    print(text, flush=True)


def say_why(stale: str | None, overrides: list[str]) -> None:
    """Print why a stage runs and which of the run's settings its flags override."""
    if stale is not None:
        say(f"  because {stale}")
    for line in overrides:
        say(f"  override, for this run of this stage: {line}")


def say_times(report: StageReport, path: Path, profile: ProfileReport | None = None) -> None:
    """Print where a stage's time went, what it wrote, and what it compiled and measured."""
    parts = [
        f"{name.replace('_', ' ')} {seconds:.1f}"
        for name, seconds in report.parts().items()
        if seconds >= 0.05 or name == "run"
    ]
    say(f"  wrote {path} in {report.wall_seconds():.1f} s ({', '.join(parts)})")
    programs = report.programs
    if programs.each:
        say(f"  programs: {programs.compiled} compiled, {programs.from_cache} from the cache")
    if report.repeats:
        spread = RepeatReport.of(report.repeats)
        say(
            f"  {len(report.repeats)} further run(s): median {spread.median:.4f} s, "
            f"{spread.min:.4f} to {spread.max:.4f}"
        )
    for line in lines_of(profile) if profile is not None else ():
        say(line)


def warn(text: str) -> None:
    """Print a warning."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def make_command(function: Callable[..., Any]) -> TyperCommand:
    """A command whose flags are spelled with underscores; hyphens work too."""
    app = typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={
            "token_normalize_func": lambda token: token.replace("-", "_"),
            "help_option_names": ["--help"],
        },
    )
    app.command()(function)
    command = typer.main.get_command(app)
    assert isinstance(command, TyperCommand)
    return command


def run_command(command: TyperCommand, called: str | None = None) -> NoReturn:
    """Run a script's command; end the process with the documented exit code.

    Every failure is one sentence; a traceback comes only with `--debug`.

    Args:
        called: how the user calls it; python and the script's name, if None.
    """
    for stream in (sys.stdout, sys.stderr):
        # A name that the terminal's encoding does not have is no reason to end.
        getattr(stream, "reconfigure")(errors="backslashreplace")  # noqa: B009
    stop_at_once_on_signals()
    keep_to_ourselves()
    code, message = run_in_process(command, sys.argv[1:], called or f"python {sys.argv[0]}")
    if message is not None:
        print(f"error: {message}", file=sys.stderr, flush=True)
    _leave(code)


def run_in_process(
    command: TyperCommand, arguments: list[str], called: str
) -> tuple[int, str | None]:
    """Run a script's command. Returns the documented exit code, and the sentence of a failure."""
    try:
        return command.main(arguments, prog_name=called, standalone_mode=False) or 0, None
    except Exception as error:
        if "--debug" in arguments and not isinstance(error, TyperException | MemoryError):
            traceback.print_exc()
        code, message = _explain(error, called)
        return code, without_controls(message)


def _explain(error: Exception, called: str) -> tuple[int, str]:
    """The exit code and the sentence for what ended a script."""
    what = in_one_line(error)
    if isinstance(error, TyperException):
        formatted = getattr(error, "format_message", None)
        message = str(formatted() if formatted else error)
        return 2, f"{message.rstrip('.')} ({called} --help lists the flags)"
    if isinstance(error, StageError):
        return error.exit_code, str(error)
    if isinstance(error, MemoryError):
        return 5, f"out of memory: {LESS_MEMORY}"
    if isinstance(error, OSError):
        named = f"{error.filename}: " if error.filename is not None else ""
        return (
            5,
            f"{shorten(named, 300)}{error.strerror or error}: choose another place, or free it",
        )
    if OUT_OF_DEVICE_MEMORY in what:
        return 5, f"out of memory on the devices ({what}): {LESS_MEMORY}"
    said = f"{type(error).__name__}: {what} (--debug shows where)"
    return 1, f"a defect of this program: {said}"


def keep_to_ourselves() -> None:
    """Turn the telemetry of the libraries off; they read this when they are imported."""
    for name in ("HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        os.environ[name] = "1"


def _leave(code: int) -> NoReturn:
    """End the process: what is registered for its exit is run, the interpreter not taken apart.

    That takes more than a second with torch and jax loaded, and nothing waits for it.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)
