"""Shared fixtures. Tests run on the CPU, with eight virtual devices for the sharded ones."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

from common.files import stage_table

PROJECT_DIR = Path(__file__).resolve().parent.parent
DEMO = PROJECT_DIR / "models" / "demo"
STAGES = {stage.number: PROJECT_DIR / "stages" / stage.script for stage in stage_table.STAGES}
RUN_ALL = PROJECT_DIR / "tools" / "run_all.py"

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def run_script(
    script: Path, *arguments: object, **options: object
) -> "subprocess.CompletedProcess":
    """Run a script as users do, in a process of its own."""
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
        **options,  # type: ignore[call-overload]
    )


@pytest.fixture(scope="session")
def stage() -> Run:
    """Run stage N: `stage(2, "--output_dir", folder)`."""
    return lambda number, *arguments, **options: run_script(STAGES[number], *arguments, **options)


@pytest.fixture(scope="session")
def run_all() -> Run:
    """Run all stages, without the set-up that `run_all.sh` does first."""
    return lambda *arguments, **options: run_script(RUN_ALL, *arguments, **options)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, run_all: Run) -> Path:
    """A run directory of the demo checkpoint, two images; never changed by a test."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    result = run_all(
        *("--output_dir", folder, "--num_inference_steps", 4, "--num_images_per_prompt", 2)
    )
    assert result.returncode == 0, result.stderr
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
