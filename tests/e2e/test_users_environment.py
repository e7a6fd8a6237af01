"""Stages as users' shells, schedulers and machines start them: real processes, to their end."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import DEMO, LONG, PROJECT_DIR, RUN_ALL, STAGES, Run, file_contents
from tests.refusals import expect


def programs_of(said: str) -> tuple[int, int]:
    """How many programs a run compiled, and read from the cache."""
    found = re.search(r"programs: (\d+) compiled, (\d+) from the cache", said)
    assert found is not None, said
    return int(found[1]), int(found[2])


@pytest.mark.parametrize("columns", [40, 60, 80])
def test_help_names_every_flag_whole(stage: Run, columns: int) -> None:
    wide = stage(2, "--help", variables={"COLUMNS": "200"})
    narrow = stage(2, "-h", variables={"COLUMNS": str(columns)})
    assert wide.returncode == narrow.returncode == 0
    flags = set(re.findall(r"--[a-z_]+", wide.stdout))
    assert len(flags) > 30 and flags <= set(re.findall(r"--[a-z_]+", narrow.stdout))


def test_the_version(stage: Run) -> None:
    from importlib.metadata import version

    for said in (stage(1, "--version"), stage(3, "--version")):
        assert said.returncode == 0 and version("staged-diffusion") in said.stdout


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("XLA_FLAGS", "--xla_no_such_flag=1", ["XLA refuses XLA_FLAGS", "LIBTPU_INIT_ARGS"]),
        ("XLA_FLAGS", "--xla_tpu_enable_latency_hiding_scheduler=true", ["LIBTPU_INIT_ARGS"]),
        ("JAX_DISABLE_JIT", "1", ["JAX_DISABLE_JIT is set", "unset it"]),
        ("JAX_ENABLE_X64", "perhaps", ["JAX_ENABLE_X64"]),
    ],
)
def test_variables_under_which_nothing_runs_exit_5(
    run_copy: Path, stage: Run, name: str, value: str, words: list[str]
) -> None:
    before = file_contents(run_copy)
    flags = ("--output_dir", run_copy, "--backend", "jax")
    expect(stage(2, *flags, variables={name: value}), 5, *words)
    assert file_contents(run_copy) == before


def test_a_path_in_the_home_folder(tmp_path: Path, stage: Run) -> None:
    flags = ("--output_dir=~/run", "--model_id", DEMO, "--lora=~/none.safetensors")
    result = stage(1, *flags, variables={"HOME": str(tmp_path)})
    expect(result, 3, f"--lora {tmp_path}/none.safetensors")


@pytest.mark.slow
@pytest.mark.long
def test_the_compile_cache_damaged_elsewhere_and_not_there(
    run_copy: Path, tmp_path: Path, stage: Run
) -> None:
    def denoise(cache: Path | str) -> "subprocess.CompletedProcess[str]":
        variables = {"XDG_CACHE_HOME": str(cache)}
        result = stage(2, "--output_dir", run_copy, "--backend", "jax", variables=variables)
        assert result.returncode == 0, result.stderr
        return result

    cache = tmp_path / "cache"
    denoise(cache)
    assert programs_of(denoise(cache).stdout) == (0, 1)
    entry = max(cache.rglob("*-cache"), key=lambda path: path.stat().st_size)
    entry.write_bytes(entry.read_bytes()[:1000])
    result = denoise(cache)
    assert f"{entry} is damaged: it is removed" in result.stderr
    assert programs_of(result.stdout)[0] == 1
    assert programs_of(denoise(cache).stdout) == (0, 1)

    (tmp_path / "file").write_text("")
    said = denoise(tmp_path / "file").stderr
    assert said.count("cannot be written, so that programs are compiled in every process") == 1

    before = set(PROJECT_DIR.iterdir())
    home = {"XDG_CACHE_HOME": "relative", "HOME": str(tmp_path)}
    result = stage(2, "--output_dir", run_copy, "--backend", "jax", variables=home)
    assert result.returncode == 0, result.stderr
    assert set(PROJECT_DIR.iterdir()) == before and (tmp_path / ".cache").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize(
    "number",
    [pytest.param(n, marks=LONG) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)],
)
def test_a_signal_to_run_all_alone_reaches_its_stage(
    tmp_path: Path, run_all: Run, number: signal.Signals
) -> None:
    run_dir = tmp_path / "run"
    flags = ("--num_inference_steps", "600", "--output_dir", str(run_dir), "--checkpoint_every=20")
    process = subprocess.Popen(
        [sys.executable, str(RUN_ALL), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=PROJECT_DIR,
        start_new_session=True,
    )
    while not (run_dir / "stage2_progress.safetensors").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    code = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129}[number]
    assert process.returncode == code, said
    assert re.search(r"after step \d+ of 600, which are kept", said), said
    with pytest.raises(ProcessLookupError):  # nobody of its session is left
        os.killpg(process.pid, 0)
    result = run_all(*flags)
    assert result.returncode == 0 and "goes on after step" in result.stdout, result.stderr


@pytest.mark.slow
def test_a_signal_that_nohup_ignores_stays_ignored(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = f"nohup {sys.executable} {STAGES[1]} --output_dir {run_dir} >{tmp_path}/said 2>&1"
    process = subprocess.Popen(["bash", "-c", f"exec {command}"], cwd=PROJECT_DIR)
    time.sleep(2)  # by then its handlers are set
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=120) == 0, (tmp_path / "said").read_text()
    assert (run_dir / "stage1_embeddings.safetensors").exists()
