"""Run the three stages one after the other, each as a process of its own.

    ./run_all.sh --prompt "a large red star on a blue background"
    ./run_all.sh --sweep "scheduler=euler,ddim num_inference_steps=10,20,30"

Takes any stage's flags and gives each stage those it knows. Stages that are up to date are skipped;
the first failing stage's exit code is this program's.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any

PROJECT_DIR = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT_DIR))

import typer
from typer.core import TyperCommand

from common.compute.backends import has_only_cpus
from common.errors import BadSettingError, StageError
from common.files import artifacts, picture_files
from common.files.run_lock import HELD_BY_PARENT, RUN_LOCK, RunLock
from common.models.hub import OFFLINE
from common.runs import flags
from common.runs.generation import DEFAULT_OUTPUT_DIR, read_generation_config
from common.runs.preloaded import PreloadedStage
from common.runs.sweep import StageRun, parse_sweep, run_sweep
from common.stopping import STOP_SIGNALS
from stages import stage1_text_encoder, stage2_unet, stage3_vae_decoder

STAGES = (stage1_text_encoder, stage2_unet, stage3_vae_decoder)
DTYPES = ("text_encoder_dtype", "unet_dtype", "vae_dtype")
RUN_ALL = "Which stages"
SECONDS_OF_A_FRESH_STAGE = 1.0  # at most; after that it has begun its work
FOR_ONE_STAGE = ("distributed", "topology", "pictures_shape", "save_hlo", "json")


def main(
    context: typer.Context,
    from_stage: Annotated[
        int,
        flags.flag("from_stage", "1|2|3", RUN_ALL, "First stage to run. [1]"),
    ] = 1,
    to_stage: Annotated[
        int,
        flags.flag("to_stage", "1|2|3", RUN_ALL, "Last stage to run. [3]"),
    ] = 3,
    force: Annotated[
        bool,
        flags.flag("force", " ", RUN_ALL, "Run fresh stages as well."),
    ] = False,
    sweep: Annotated[
        str | None,
        flags.flag("sweep", '"F=A,B …"', RUN_ALL, "All combinations of flags' values."),
    ] = None,
) -> int:
    """Make pictures from prompts: text encoder, UNet and VAE, stage by stage.

    Defaults stand in brackets; hyphens in flags work as well.
    """
    began = time.monotonic()
    given = {
        name: value
        for name, value in context.params.items()
        if str(getattr(context.get_parameter_source(name), "name", "")) == "COMMANDLINE"
    }
    run_dir = Path(given.get("output_dir") or given.get("input_dir") or DEFAULT_OUTPUT_DIR)
    commands = [] if sweep is not None else plan(given, stage_commands())
    lock = RunLock(run_dir, wait=bool(given.get("wait")), names=(RUN_LOCK,))
    context.call_on_close(lock.release)
    lock.acquire()
    if given.get("offline"):
        os.environ[OFFLINE] = "1"  # for the libraries that a stage imports before its turn
    os.environ[HELD_BY_PARENT] = os.fspath(run_dir.resolve())
    if sweep is not None:
        return run_all_cells(run_dir, given, sweep)
    code = run_in_turn(commands, libraries_of(given))
    if code != 0:
        return code
    if to_stage == 3:
        source_dir = Path(given.get("input_dir", run_dir)) if from_stage == 3 else run_dir
        picture = picture_path(run_dir, source_dir, given.get("image_format"))
        flags.say(f"picture: {picture} ({time.monotonic() - began:.1f} s in all)")
    return 0


def run_all_cells(run_dir: Path, given: dict[str, Any], text: str) -> int:
    """Run a sweep, and write its page. Returns the exit code of the first cell that failed."""
    given = {name: value for name, value in given.items() if name != "sweep"}
    for name in ("from_stage", "to_stage", "input_dir"):
        if name in given:
            raise BadSettingError(f"--{name} does not go with --sweep, which runs what is needed")
    commands = stage_commands()
    takes: dict[str, list[int]] = {}
    for stage, command in enumerate(commands, 1):
        for parameter in command.params:
            if parameter.name is not None and not getattr(parameter, "is_flag", False):
                takes.setdefault(parameter.name, []).append(stage)
    swept = parse_sweep(text, takes, given)

    def run(needed: StageRun) -> tuple[int, str]:
        shared = {n: v for n, v in given.items() if n != "output_dir"}
        arguments = plan(shared | {"from_stage": 1, "to_stage": 3}, commands)[needed.stage - 1]
        arguments += [f"--{name}={value}" for name, value in needed.values.items()]
        if needed.stage > 1:
            arguments.append(f"--input_dir={needed.source}")
        return run_stage_and_listen([*arguments, f"--output_dir={needed.folder}"])

    code = run_sweep(run_dir, swept, takes, run, flags.say)
    failed = sum(cell.exit_code != 0 for cell in swept.cells)
    flags.say(f"sweep: {len(swept.cells) - failed} of {len(swept.cells)} cells done")
    from tools import report_page

    try:
        flags.say(f"page: {report_page.write_page(run_dir / report_page.PAGE_FILE, [run_dir])}")
    except StageError as error:
        flags.warn(f"no page was written: {error}")
    return code


def stage_commands() -> list[TyperCommand]:
    """The commands of the three stages."""
    return [flags.make_command(stage.main) for stage in STAGES]


def make_command() -> TyperCommand:
    """One command with this program's own flags and those of all stages."""
    command = flags.make_command(main)
    own = [parameter.name for parameter in command.params]
    names = {*own, "skip_fresh", *FOR_ONE_STAGE}
    for stage_command in stage_commands():
        for parameter in stage_command.params:
            if parameter.name not in names:
                names.add(parameter.name)
                command.params.append(parameter)
    run = command.callback
    assert run is not None
    # The stages' flags reach `main` through its context.
    command.callback = lambda **params: run(
        **{name: params[name] for name in own if name in params}
    )
    return command


def script_of(stage: int) -> str:
    """A stage's script."""
    return str(PROJECT_DIR / "stages" / f"{STAGES[stage - 1].__name__.split('.')[-1]}.py")


def flags_for(
    stage_command: TyperCommand, given: dict[str, Any], *, first: bool
) -> tuple[list[str], set[str]]:
    """The flags among those given that a stage knows, as arguments, and their names."""
    arguments, names = [], set()
    for parameter in stage_command.params:
        name = parameter.name
        if name not in given or (name == "input_dir" and not first):
            continue
        names.add(name)
        value = given[name]
        if value is True:
            arguments.append(f"--{name}")
        else:
            values = value if isinstance(value, list | tuple) else [value]
            arguments += [f"--{name}={item}" for item in values]
    return arguments, names


def plan(given: dict[str, Any], commands_of_stages: list[TyperCommand]) -> list[list[str]]:
    """The command of each stage to run, for the flags that were given.

    Raises:
        BadSettingError: stages out of order, or a flag that no stage to run knows.
    """
    given = dict(given)
    from_stage, to_stage = given.pop("from_stage", 1), given.pop("to_stage", 3)
    force = given.pop("force", False)
    if not 1 <= from_stage <= to_stage <= 3:
        raise BadSettingError(
            f"--from_stage {from_stage} --to_stage {to_stage}: stages are 1 to 3, in this order"
        )
    for_all: set[str] = set()
    if "dtype" in given:
        # To all three stages: settings of the run, so that each stage finds its own.
        dtype = given.pop("dtype")
        for_all = set(DTYPES) - given.keys()
        given = dict.fromkeys(DTYPES, dtype) | given
    if "input_dir" in given:
        given.setdefault("output_dir", given["input_dir"])
    commands, known = [], set()
    for number in range(from_stage, to_stage + 1):
        arguments, names = flags_for(
            commands_of_stages[number - 1], given, first=number == from_stage
        )
        known |= names
        skipping = [] if force else ["--skip_fresh"]
        commands.append([sys.executable, script_of(number), *arguments, *skipping])
    unused = given.keys() - known - for_all
    if unused:
        flags = ", ".join(f"--{name}" for name in sorted(unused))
        raise BadSettingError(f"{flags}: no stage from {from_stage} to {to_stage} takes it")
    return commands


def libraries_of(given: dict[str, Any]) -> dict[str, list[str]] | None:
    """Script → modules that its stage imports, as far as flags tell it, in their order.

    None where no stage is to import beside another one: libraries are to be heard, or times are
    measured.
    """
    if given.keys() & {"debug", "repeat", "profile", "profile_dir", "profile_steps"}:
        return None
    in_torch = ["torch", "diffusers.utils"]
    in_jax = [*in_torch, "common.compute.jax_start", "common.compute.torchax_runtime"]
    backend = given.get("backend", "auto")
    decodes_by_torch = backend == "torch" or (backend == "auto" and has_only_cpus())
    dtype = given.get("unet_dtype") or given.get("dtype") or "auto"
    in_16_bits = dtype not in ("auto", "float32")
    denoises_by_torch = backend == "torch" or (decodes_by_torch and in_16_bits)
    return {
        script_of(2): in_torch if denoises_by_torch else in_jax,
        script_of(3): in_torch if decodes_by_torch else in_jax,
    }


def run_in_turn(commands: list[list[str]], libraries: dict[str, list[str]] | None) -> int:
    """Run stages one after the other. Returns the exit code of the first that failed, or 0.

    Args:
        libraries: what each stage's script imports while the one before it runs; None: nothing.
    """
    ahead: PreloadedStage | None = None

    def prepare(command: list[str]) -> None:
        nonlocal ahead
        assert libraries is not None
        ahead = PreloadedStage(command[1], libraries[command[1]])

    for command, following in zip(commands, [*commands[1:], None], strict=True):
        process = ahead.begin(command[2:]) if ahead is not None else None
        ahead = None
        meanwhile = None
        if libraries is not None and following is not None:
            meanwhile = partial(prepare, following)
        process = process or subprocess.Popen(command, text=True)
        code = wait_for_stage(process, meanwhile=meanwhile)
        if code != 0:
            if ahead is not None:
                ahead.give_up()
            return code
    return 0


def run_stage_and_listen(command: list[str]) -> tuple[int, str]:
    """Run one stage; what it says of an error is kept. Returns its exit code and the error."""
    heard: list[str] = []

    def listen(line: str) -> None:
        print(line, end="", file=sys.stderr, flush=True)
        if line.startswith("error: "):
            heard.append(line.removeprefix("error: ").strip())

    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    code = wait_for_stage(process, listen)
    return code, heard[-1] if heard else ""


def wait_for_stage(
    process: "subprocess.Popen[str]",
    listen: Callable[[str], None] | None = None,
    meanwhile: Callable[[], None] | None = None,
) -> int:
    """Wait for a stage. Returns its exit code, or that of a signal to stop.

    Args:
        listen: is given each line of the stage's messages, which otherwise go to the terminal.
        meanwhile: called when the stage has more to do than to see that its outputs are fresh.
    """
    received: list[int] = []

    def pass_on(number: int, _: object) -> None:
        received.append(number)
        # Ctrl-C reaches the stage from the terminal by itself.
        if number == signal.SIGTERM:
            process.terminate()

    before = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS}
    try:
        if listen is not None and process.stderr is not None:
            for line in process.stderr:
                listen(line)
        try:
            code = process.wait(timeout=SECONDS_OF_A_FRESH_STAGE)
        except subprocess.TimeoutExpired:
            if meanwhile is not None and not received:
                with suppress(OSError):  # without another process the run only takes longer
                    meanwhile()
            code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received and code == 0:
        return STOP_SIGNALS[received[0]][1]
    return 128 - code if code < 0 else code


def picture_path(run_dir: Path, source_dir: Path, image_format: str | None) -> Path:
    """The picture, or the grid of several, of the latents in `source_dir`."""
    latents_file = source_dir / artifacts.LATENTS_FILE
    latents = artifacts.inspect(latents_file, verify=False).tensors["latents"]
    chosen: Any = image_format or read_generation_config(source_dir).image_format
    names, grid = picture_files.picture_names(latents.shape[0], chosen)
    return run_dir / (grid or names[0])


if __name__ == "__main__":
    flags.run_command(make_command(), "./run_all.sh")
