"""All stages of a run, one after the other, each as a process of its own."""

import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

from common.compute.backends import BACKENDS, expected_backend
from common.compute.options import RunOptions
from common.errors import BadSettingError
from common.files import artifacts
from common.files.picture_files import grid_names
from common.files.row_places import row_places
from common.files.rows_to_come import RowsToCome
from common.files.run_lock import process_of_stage
from common.files.stage_table import (
    DECODE,
    DENOISE,
    ENCODE_PICTURES,
    FIRST,
    LAST,
    LATENTS_FILE,
    STAGES,
    Stage,
    stages_from,
)
from common.models.model_settings import PROJECT_DIR
from common.runs.flags import Flag, all_flags
from common.runs.generation import read_generation_config
from common.runs.preloaded import PreloadedStage
from common.runs.run_index import read_index
from common.stopping import STOP_SIGNALS, heard_signals, holding_signals

SECONDS_OF_A_FRESH_STAGE = 1.0  # at most; after that it has begun its work
SECONDS_BETWEEN_LOOKS = 0.1


def script_of(stage: Stage) -> str:
    """A stage's script."""
    return str(PROJECT_DIR / "stages" / stage.script)


def flags_of_a_run() -> list[Flag]:
    """The flags that a run of all stages takes."""
    return [flag for flag in all_flags() if not flag.declared.alone]


def arguments_for(
    stage: Stage, given: Mapping[str, Any], *, first: bool
) -> tuple[list[str], set[str]]:
    """The flags among those given that a stage knows, as arguments, and their names.

    Args:
        first: whether the stage is the first to run, so that its input may be elsewhere.
    """
    arguments, names = [], set()
    for name in _names_of(stage):
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


@cache
def _names_of(stage: Stage) -> list[str]:
    """The names of the flags that a stage knows, with those that say no."""
    return [each.name for flag in all_flags() if flag.is_of(stage) for each in flag.parameters()]


def plan(
    given: Mapping[str, Any],
    *,
    from_stage: int = FIRST.number,
    to_stage: int = LAST.number,
    force: bool = False,
) -> dict[Stage, list[str]]:
    """The command of each stage to run, for the flags that were given.

    Raises:
        BadSettingError: stages out of order, or a flag that no stage to run knows.
    """
    given = dict(given)
    order = [stage.number for stage in STAGES]
    if not (
        {from_stage, to_stage} <= {*order} and order.index(from_stage) <= order.index(to_stage)
    ):
        raise BadSettingError(
            f"--from_stage {from_stage} --to_stage {to_stage}: stages are "
            f"{', '.join(map(str, order))}, in this order"
        )
    for_all: set[str] = set()
    if "dtype" in given:
        # To all stages: settings of the run, so that each stage finds its own.
        dtype, dtypes = given.pop("dtype"), [stage.dtype for stage in STAGES]
        for_all = set(dtypes) - given.keys()
        given = dict.fromkeys(dtypes, dtype) | given
    if "input_dir" in given:
        given.setdefault("output_dir", given["input_dir"])
    commands, known = {}, set()
    for stage in stages_from(from_stage, to_stage):
        arguments, names = arguments_for(stage, given, first=stage.number == from_stage)
        known |= names
        skipping = [] if force else ["--skip_fresh"]
        commands[stage] = [sys.executable, script_of(stage), *arguments, *skipping]
    unused = given.keys() - known - for_all
    if unused:
        flags = ", ".join(f"--{name}" for name in sorted(unused))
        raise BadSettingError(f"{flags}: no stage from {from_stage} to {to_stage} takes it")
    return commands


def libraries_of(given: Mapping[str, Any]) -> dict[str, list[str]] | None:
    """Script → modules that its stage imports, as far as flags tell it, in their order.

    None where no stage is to import beside another one: libraries are to be heard, or times are
    measured.
    """
    if given.keys() & {"debug", "repeat", "profile", "profile_dir", "profile_steps"}:
        return None
    dtype = given.get("unet_dtype") or given.get("dtype") or "auto"
    in_16_bits = dtype not in ("auto", "float32")
    torch_on_cpus = {ENCODE_PICTURES: True, DENOISE: in_16_bits, DECODE: True}
    name = given.get("backend")
    options = RunOptions(backend=name) if name in BACKENDS else RunOptions()
    of_vae = options.model_copy(update={"remote_vae": given.get("remote_vae")})
    return {
        script_of(stage): [
            *expected_backend(
                options if stage is DENOISE else of_vae, torch_on_cpus=to_torch
            ).libraries
        ]
        for stage, to_torch in torch_on_cpus.items()
    }


def run_in_turn(
    commands: Mapping[Stage, list[str]],
    libraries: dict[str, list[str]] | None,
    settled: Path | None = None,
    *,
    stream: Path | None = None,
) -> int:
    """Run stages one after the other. Returns the exit code of the first that failed, or 0.

    Args:
        libraries: what each stage's script imports while the one before it runs; None: nothing.
        settled: the folder that has the run's settings when the first stage has run, which say
            whether it has the stages that are for pictures alone; None: it has not.
        stream: the run directory, where stage 3 is to decode what stage 2 has finished while that
            runs; None: when its turn has come.
    """
    ahead, waiting = _Ahead(libraries), [*commands]
    while waiting:
        stage = waiting.pop(0)
        if stage.of_pictures and (settled is None or not begins_with_pictures(settled)):
            continue
        process = ahead.start(commands[stage])
        following = next((each for each in waiting if not each.of_pictures), None)
        meanwhile = None
        if libraries is not None and following is not None and ahead.stage is None:
            meanwhile = partial(ahead.prepare, commands[following])
        beside = None
        if stream is not None and stage is DENOISE and following is DECODE:
            command = [*commands[DECODE], "--stream"]
            beside = _Beside(process, stream, partial(ahead.start, command))
        code = wait_for_stage(process, meanwhile=meanwhile, beside=beside)
        if beside is not None and beside.process is not None:
            code = beside.end(code)
            waiting.remove(DECODE)
        if code != 0:
            ahead.give_up()
            return code
    return 0


class _Ahead:
    """A stage whose libraries are imported before its turn."""

    def __init__(self, libraries: dict[str, list[str]] | None) -> None:
        """`libraries` as `run_in_turn`."""
        self._libraries, self._script = libraries, ""
        self.stage: PreloadedStage | None = None

    def prepare(self, command: list[str]) -> None:
        """Begin to import what a stage needs."""
        assert self._libraries is not None
        self._script = command[1]
        self.stage = PreloadedStage(command[1], self._libraries[command[1]])

    def start(self, command: list[str]) -> "subprocess.Popen[str]":
        """Start a stage: the one that was prepared, if it is this one."""
        process = None
        if self.stage is not None and self._script == command[1]:
            process, self.stage = self.stage.begin(command[2:]), None
        if process is not None:
            return process
        with holding_signals():
            return subprocess.Popen(command, text=True)

    def give_up(self) -> None:
        """Its turn does not come."""
        if self.stage is not None:
            self.stage.give_up()


class _Beside:
    """Stage 3 beside the stage 2 that it reads from."""

    def __init__(
        self,
        stage_2: "subprocess.Popen[str]",
        run_dir: Path,
        start: "Callable[[], subprocess.Popen[str]]",
    ) -> None:
        self._stage_2, self._start = stage_2, start
        self._to_come = RowsToCome(run_dir, DENOISE)
        self.process: subprocess.Popen[str] | None = None

    def start_if_due(self) -> bool:
        """Start it once stage 2 has finished a group. Returns whether it has been started."""
        is_this = process_of_stage(self._to_come.path.parent) == self._stage_2.pid
        if self.process is None and is_this and self._to_come.look():
            self.process = self._start()
        return self.process is not None

    def end(self, code: int) -> int:
        """Wait for it, or end it where stage 2 has failed. Returns the code of the first to fail.

        Args:
            code: stage 2's.
        """
        assert self.process is not None
        if code != 0:
            self.process.terminate()
            self.process.wait()
            return code
        return wait_for_stage(self.process)


def begins_with_pictures(run_dir: Path) -> bool:
    """Whether the run that a folder has the settings of begins with pictures."""
    return read_generation_config(run_dir).has_pictures


def wait_for_stage(
    process: "subprocess.Popen[str]",
    meanwhile: Callable[[], None] | None = None,
    beside: _Beside | None = None,
) -> int:
    """Wait for a stage. Returns its exit code, or that of a signal to stop.

    Args:
        meanwhile: called when the stage has more to do than to see that its outputs are fresh.
        beside: another stage that is to be started while this one runs.
    """
    received: list[int] = []

    def pass_on(number: int, _: object) -> None:
        received.append(number)
        # One that the terminal or a group gave the stage as well counts once there.
        process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in heard_signals()}
    try:
        try:
            code = process.wait(timeout=SECONDS_OF_A_FRESH_STAGE)
        except subprocess.TimeoutExpired:
            if meanwhile is not None and not received:
                with suppress(OSError):  # without another process the run only takes longer
                    meanwhile()
            while beside is not None and not received and not beside.start_if_due():
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=SECONDS_BETWEEN_LOOKS)
                    break
            code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received and code == 0:
        return STOP_SIGNALS[received[0]][1]
    return 128 - code if code < 0 else code


def picture_path(run_dir: Path, source_dir: Path, given: Mapping[str, Any]) -> Path:
    """The picture, or the grid of several, of the latents in `source_dir`.

    Args:
        given: settings by flags.
    """
    images = len(row_places(artifacts.inspect(source_dir / LATENTS_FILE, verify=False)))
    config, _ = read_generation_config(source_dir).override(
        {name: given[name] for name in ("grid_images",) if name in given}
    )
    first: str = read_index(run_dir)[0]["file"]
    written: Any = Path(first).suffix.removeprefix(".")
    return run_dir / [*grid_names(images, config.grid_images, written), first][0]
