"""Shared fixtures. Tests run on the CPU, with eight virtual devices for the sharded ones."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
# Tests' own processes compile without LLVM's longer passes, which take a third of their time;
# stages that are started as users start them (`run_script`) compile as users' do.
COMPILE_FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def xla_flags(devices: int) -> str:
    """XLA_FLAGS of a process of the tests' own: how many virtual devices it has."""
    return f"--xla_force_host_platform_device_count={devices} {COMPILE_FAST}"


os.environ["XLA_FLAGS"] = xla_flags(8)
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
from filelock import FileLock

from common.files import stage_table
from common.stopping import STOP_SIGNALS
from tests.browsers import launched

PROJECT_DIR = Path(__file__).resolve().parent.parent
DEMO = PROJECT_DIR / "models" / "demo"
STAGES = {stage.number: PROJECT_DIR / "stages" / stage.script for stage in stage_table.STAGES}
RUN_ALL = PROJECT_DIR / "tools" / "run_all.py"

LONG = (pytest.mark.slow, pytest.mark.long)  # what CI has no time for

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def run_script(
    script: Path, *arguments: object, variables: Mapping[str, str] | None = None, **options: object
) -> "subprocess.CompletedProcess":
    """Run a script as users do, in a process of its own, with these variables besides."""
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    environment |= variables or {}
    return subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
        **options,  # type: ignore[call-overload]
    )


@pytest.fixture(scope="session", autouse=True)
def heard_signals() -> Iterator[None]:
    """What the tests' own start ignores, as nohup's and a background's, their processes hear."""
    before = {n: signal.getsignal(n) for n in STOP_SIGNALS}
    ignored = [number for number, handler in before.items() if handler == signal.SIG_IGN]
    for number in ignored:
        own = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, own)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.fixture(scope="session")
def stage() -> Run:
    """Run stage N: `stage(2, "--output_dir", folder)`."""
    return lambda number, *arguments, **options: run_script(STAGES[number], *arguments, **options)


@pytest.fixture(scope="session")
def quick_stage() -> Iterator[Run]:
    """As `stage`, in one process for all that ask, which has imported the libraries by then."""
    from tests.own_process import StageProcess

    process = StageProcess()
    yield process.run
    process.close()


@pytest.fixture(scope="session")
def run_all() -> Run:
    """Run all stages, without the set-up that `run_all.sh` does first."""
    return lambda *arguments, **options: run_script(RUN_ALL, *arguments, **options)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as found:
        yield found


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, run_all: Run) -> Path:
    """A run directory of the demo checkpoint, two images; never changed by a test.

    Made once for all of pytest's processes. What the run said is in `said` beside it.
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder, said = shared / "finished" / "run", shared / "finished" / "said"
    with FileLock(shared / "finished.lock"):
        if not said.exists():
            result = run_all(
                *("--output_dir", folder, "--num_inference_steps", 4, "--num_images_per_prompt", 2)
            )
            assert result.returncode == 0, result.stderr
            said.write_text(result.stdout + result.stderr)
    return folder


@pytest.fixture
def run_copy(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may change."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run directory for the demo checkpoint, its embeddings and latents zeros from elsewhere."""
    from safetensors.torch import save_file

    from common.files.stage_table import EMBEDDINGS_FILE, LATENTS_FILE
    from common.runs.generation import write_generation_config
    from tests.configs import make_config
    from tests.refusals import EMBEDDINGS, LATENTS, zeros

    folder = tmp_path / "run"
    write_generation_config(folder, make_config(DEMO, height=64, width=64))
    save_file(zeros(EMBEDDINGS), folder / EMBEDDINGS_FILE)
    save_file(zeros(LATENTS), folder / LATENTS_FILE)
    return folder


@pytest.fixture
def demo_copy(tmp_path: Path) -> Path:
    """A copy of the demo checkpoint that a test may damage."""
    return Path(shutil.copytree(DEMO, tmp_path / "checkpoint"))


def file_contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
