"""Run the stages one after the other, each as a process of its own.

    ./run_all.sh --prompt "a large red star on a blue background"
    ./run_all.sh --sweep "scheduler=euler,ddim num_inference_steps=10,20,30"

Takes any stage's flags and gives each stage those it knows. Stages that are up to date are skipped;
the first failing stage's exit code is this program's.
"""

import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.stopping import stop_at_once_on_signals

if __name__ == "__main__":  # the other imports take a second
    stop_at_once_on_signals()

import typer
from typer.core import TyperCommand

from common.commands import flag
from common.compute.backends import TorchBackend
from common.compute.options import API_KEY
from common.compute.platforms import may_have_tpu
from common.errors import BadSettingError, StageError
from common.files.run_files import DEFAULT_OUTPUT_DIR
from common.files.run_lock import HELD_BY_PARENT, RUN_LOCK, RunLock
from common.files.stage_table import DENOISE, ENCODE_PICTURES, FIRST, LAST, STAGES
from common.messages import say, warn
from common.models.hub import OFFLINE
from common.process import run_command
from common.runs.flags import add_flags, all_flags
from common.runs.in_turn import flags_of_a_run, plan, run_in_turn
from common.runs.passes import HIRES_STRENGTH, Passes, Turns
from common.runs.sweep import CellRun, parse_sweep, refuse_idle_seeds, run_sweep
from common.serving.jobs import Step
from common.serving.stage_processes import StageProcesses, flags_of_processes, groups_of
from common.serving.warm import find_warm
from tools import report_page

JOBS_FOLDER = ".jobs"  # of a server, where none is named
RUN_ALL, PASSES = "Which stages", "Further passes over the latents"
SERVING = "A server"
FOLDERS = ("models_dir", "loras_dir", "embeddings_dir")  # of what requests may name
OF_PROCESSES = ("chips", "keep", "max_wait_ms")  # of a server's, those that serve stages
OF_SERVERS = {"serve", "host", "port", "api_key", "keep_jobs", *OF_PROCESSES, *FOLDERS}
OF_REPLICAS = OF_SERVERS - {"serve", "chips"}
NUMBERS = "|".join(str(stage.number) for stage in STAGES)


def main(
    context: typer.Context,
    from_stage: Annotated[
        str, flag("from_stage", NUMBERS, RUN_ALL, f"First stage, or pass. [{FIRST.number}]")
    ] = str(FIRST.number),
    to_stage: Annotated[
        int, flag("to_stage", NUMBERS, RUN_ALL, f"Last stage to run. [{LAST.number}]")
    ] = LAST.number,
    force: Annotated[bool, flag("force", " ", RUN_ALL, "Run fresh stages as well.")] = False,
    stream: Annotated[
        bool, flag("stream", " ", RUN_ALL, "Decode pictures while others are denoised.")
    ] = False,
    sweep: Annotated[
        str | None,
        flag("sweep", '"F=A,B …"', RUN_ALL, "All combinations of flags' values."),
    ] = None,
    warm: Annotated[
        Literal["auto", "never"],
        flag("warm", "HOW", RUN_ALL, "auto: by a warm server, or never. [auto]"),
    ] = "auto",
    serve: Annotated[bool, flag("serve", " ", SERVING, "Stay, and answer HTTP requests.")] = False,
    host: Annotated[
        str, flag("host", "NAME", SERVING, "Address; others need a key. [127.0.0.1]")
    ] = "127.0.0.1",
    port: Annotated[int, flag("port", "N", SERVING, "0: one that is free. [8000]")] = 8000,
    api_key: Annotated[
        str | None, flag("api_key", "KEY", SERVING, "What requests must have.")
    ] = None,
    chips: Annotated[
        list[str] | None, flag("chips", "N,…", SERVING, "A process for each, as 0-3. [all: one]")
    ] = None,
    keep: Annotated[
        int | None, flag("keep", "N", SERVING, "Checkpoints to keep in memory. [2]", least=1)
    ] = None,
    max_wait_ms: Annotated[
        int | None,
        flag("max_wait_ms", "N", SERVING, "For requests to denoise at once. [0]", least=0),
    ] = None,
    keep_jobs: Annotated[
        int | None, flag("keep_jobs", "N", SERVING, "Ended jobs, with pictures. [all]", least=1)
    ] = None,
    models_dir: Annotated[
        Path | None, flag("models_dir", "DIR", SERVING, "Checkpoints that requests may name.")
    ] = None,
    loras_dir: Annotated[
        Path | None, flag("loras_dir", "DIR", SERVING, "LoRAs that requests may name.")
    ] = None,
    embeddings_dir: Annotated[
        Path | None, flag("embeddings_dir", "DIR", SERVING, "Textual inversions, likewise.")
    ] = None,
    hires: Annotated[
        float | None, flag("hires", "X", PASSES, "Again, so many times larger.")
    ] = None,
    hires_strength: Annotated[
        float | None,
        flag("hires_strength", "X", PASSES, f"Noise on it, 0 to 1. [{HIRES_STRENGTH}]"),
    ] = None,
    refiner: Annotated[
        str | None, flag("refiner", "ID", PASSES, "SDXL's refiner takes the last steps.")
    ] = None,
    refiner_strength: Annotated[
        float | None,
        flag("refiner_strength", "X", PASSES, "It begins with the result instead."),
    ] = None,
) -> int:
    """Make pictures from prompts, and from pictures: stage by stage.

    Defaults stand in brackets; hyphens in flags work as well.
    """
    began = time.monotonic()
    own = {
        "from_stage",
        "to_stage",
        "force",
        "stream",
        "sweep",
        "warm",
        *Passes.__dataclass_fields__,
    }
    own |= OF_SERVERS
    passes = Passes(
        hires=hires,
        hires_strength=hires_strength,
        refiner=refiner,
        refiner_strength=refiner_strength,
    )
    given = {
        name: value
        for name, value in context.params.items()
        if name not in own and value not in (None, [], ())
    }
    run_dir = Path(given.get("output_dir") or given.get("input_dir") or DEFAULT_OUTPUT_DIR)
    asked = [name for name in ("from_stage", "to_stage", "stream") if was_given(context, name)]
    if given.get("offline"):
        os.environ[OFFLINE] = "1"  # for the libraries that a stage imports before its turn
    if serve:
        others = {"force": force, "sweep": sweep is not None}
        others_asked = [name for name, is_asked in others.items() if is_asked]
        refuse_unserved(given, [*asked, *others_asked, *passes.names])
        from common.serving import server

        api_key = api_key or os.environ.get(API_KEY)

        shared = {name: value for name, value in given.items() if name != "output_dir"}
        jobs_dir = Path(given.get("output_dir") or DEFAULT_OUTPUT_DIR / JOBS_FOLDER)
        return server.serve(
            *(jobs_dir, shared),
            address=(host, port),
            api_key=api_key,
            kept=keep_jobs,
            of_processes={
                name: context.params[name] for name in OF_PROCESSES if was_given(context, name)
            },
            folders={name: context.params[name] for name in FOLDERS},
        )
    for name in OF_SERVERS:
        if was_given(context, name):
            raise BadSettingError(f"--{name} is for --serve: give that as well, or leave it out")
    if "only" in given and "from_stage" not in asked and goes_on(given):
        from_stage = str(DENOISE.number)  # of the run that is there
        say("--only: by the settings of the run that is there, from stage 2")
    if stream:
        refuse_unfit_streams(given)
        if from_stage == str(LAST.number) or to_stage != LAST.number:
            raise BadSettingError("--stream is for runs of stages 2 and 3: leave it out")
    if sweep is None:
        found = find_warm(given) if warm == "auto" and not stream else None
        if found is not None:
            say(f"by a warm server, whose jobs are in {found.jobs_dir}")
        runs = Turns(
            *(passes, run_dir, given),
            from_stage=from_stage,
            to_stage=to_stage,
            force=force,
            stream=stream,
        )
    lock = RunLock(run_dir, wait=bool(given.get("wait")), names=(RUN_LOCK,))
    context.call_on_close(lock.release)
    lock.acquire()
    os.environ[HELD_BY_PARENT] = os.fspath(run_dir.resolve())
    if stream:  # else jax takes three quarters of a GPU's memory for each process
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if sweep is not None:
        return run_all_cells(run_dir, given, sweep, force=force, asked=[*asked, *passes.names])
    code, picture = runs.run(run_in_turn if found is None else found.run_in_turn)
    if code == 0 and picture is not None:
        say(f"picture: {picture} ({time.monotonic() - began:.1f} s in all)")
    return code


def refuse_unserved(given: Mapping[str, Any], asked: list[str]) -> None:
    """Raise `BadSettingError` for what is of one run, or of a part of it."""
    of_prompts = (
        *("prompt", "prompt_2", "prompts_file", "prompt_syntax", "wildcards", "seed", "same_seed"),
        *("image", "mask_image", "only", "input_dir", "init_latents", "name_template"),
    )
    for name in (*asked, *(name for name in of_prompts if name in given)):
        raise BadSettingError(f"--{name} does not go with --serve: requests say what is to be made")


def goes_on(given: Mapping[str, Any]) -> bool:
    """Whether flags ask for nothing that the first stage settles alone, such as prompts."""
    later = [flag for flag in all_flags() for stage in (DENOISE, LAST) if flag.is_of(stage)]
    return given.keys() <= {each.name for flag in later for each in flag.parameters()}


def refuse_unfit_streams(given: Mapping[str, Any]) -> None:
    """Raise `BadSettingError` where two stages cannot run at once, or are not to."""
    measured = ("repeat", "profile", "profile_dir", "profile_steps")
    if name := next((name for name in measured if name in given), None):
        raise BadSettingError(
            f"--stream does not go with --{name}, which would measure two stages at once: leave "
            "one of both out"
        )
    if "input_dir" in given:
        raise BadSettingError(
            "--stream reads the run directory's own settings while stage 2 runs: leave --input_dir "
            "out"
        )
    is_elsewhere = "remote_vae" in given
    if given.get("backend") != TorchBackend.name and not is_elsewhere and may_have_tpu():
        raise BadSettingError(
            "--stream: one process holds a TPU's chips, so that stages 2 and 3 cannot run at once: "
            "leave it out"
        )


def was_given(context: typer.Context, name: str) -> bool:
    """Whether a flag with a default stands on the command line."""
    return str(getattr(context.get_parameter_source(name), "name", "")) == "COMMANDLINE"


def run_all_cells(
    run_dir: Path, given: dict[str, Any], text: str, *, force: bool, asked: list[str]
) -> int:
    """Run a sweep, and write its page. Returns the exit code of the first cell that failed.

    Args:
        asked: the flags among those for a part of the stages that were given.
    """
    for name in (*asked, *(name for name in ("input_dir", "only") if name in given)):
        raise BadSettingError(f"--{name} does not go with --sweep, which runs what is needed")
    swept = parse_sweep(text, given)
    refuse_idle_seeds(swept.axes, given)
    shared = {n: v for n, v in given.items() if n != "output_dir"}
    commands = {stage: command[2:] for stage, command in plan(shared, force=force).items()}
    # Each stage is opened once; the queue is of this sweep alone.
    with (
        tempfile.TemporaryDirectory(prefix="staged-diffusion-") as jobs_dir,
        StageProcesses(Path(jobs_dir), groups_of(), flags_of_processes(given)) as processes,
    ):

        def run(needed: CellRun) -> tuple[int, str]:
            own = [f"--{name}={value}" for name, value in needed.values.items()]
            own.append(f"--output_dir={needed.folder}")
            if needed.stage is not FIRST:
                own.append(f"--input_dir={needed.source}")
            steps = [Step(needed.stage.number, [*commands[needed.stage], *own])]
            if needed.stage is FIRST:
                output = f"--output_dir={needed.folder}"
                encoding = [*commands[ENCODE_PICTURES], output]
                steps.append(Step(ENCODE_PICTURES.number, encoding))
            return processes.do(needed.folder, steps)

        code = run_sweep(run_dir, swept, run, say)
    failed = sum(cell.exit_code != 0 for cell in swept.cells)
    say(f"sweep: {len(swept.cells) - failed} of {len(swept.cells)} cells done")
    try:
        page = report_page.write_page(run_dir / report_page.PAGE_FILE, [run_dir])
        say(f"page: {page}")
    except StageError as error:
        warn(f"no page was written: {error}")
    return code


def make_command() -> TyperCommand:
    """One command with this program's own flags and those of all stages."""
    return add_flags(main, flags_of_a_run())


if __name__ == "__main__":
    run_command(make_command(), "./run_all.sh")
