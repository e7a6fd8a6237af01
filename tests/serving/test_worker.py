"""A stage's script that serves: what it refuses, and how it ends."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.serving.job_queue import STARTED_BY, WORKERS_FOLDER, JobQueue
from common.serving.jobs import State, Step
from tests.conftest import STAGES, Run
from tests.refusals import expect


def test_what_it_cannot_serve(tmp_path: Path, stage: Run) -> None:
    expect(stage(1, "--serve", "1"), 2, "--serve: give --jobs_dir")
    expect(stage(1, "--serve", "1,7", "--jobs_dir", tmp_path), 2, "there is no stage '7'")
    flags = ("--serve", "1", "--jobs_dir", tmp_path / "x", "--prompt", "a")
    expect(stage(1, *flags), 2, "--prompt does not go with --serve")
    expect(stage(1, "--keep", 3, "--output_dir", tmp_path / "y"), 2, "--keep is for --serve")
    (tmp_path / "file").write_text("")
    expect(stage(1, "--serve", "1", "--jobs_dir", tmp_path / "file"), 5, "cannot be used")


def start(jobs_dir: Path, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, STAGES[1], "--serve", "1", "--jobs_dir", jobs_dir],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def begin(jobs_dir: Path) -> "subprocess.Popen[str]":
    """Stage 1, serving; it is ready when this returns."""
    process = start(jobs_dir)
    until = time.monotonic() + 60
    while not list((jobs_dir / WORKERS_FOLDER).glob(f"1-{process.pid}-*.json")):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.slow
def test_a_signal_ends_it_and_no_job_is_lost(tmp_path: Path, number: int, code: int) -> None:
    jobs_dir, run_dir = tmp_path / "jobs", tmp_path / "run"
    process = begin(jobs_dir)
    (ready,) = (jobs_dir / WORKERS_FOLDER).glob(f"1-{process.pid}-*.json")
    said = json.loads(ready.read_text())
    assert said == {"pid": process.pid, "host": socket.gethostname(), "stages": [1]}
    process.send_signal(number)
    assert process.wait(30) == code
    assert process.stdout is not None and "serving stage 1" in process.stdout.read()
    assert not list((jobs_dir / WORKERS_FOLDER).glob("*.json"))
    queue = JobQueue(jobs_dir)
    job = queue.add(run_dir, [Step(1, [f"--output_dir={run_dir}"])])
    assert job.state is State.WAITING
    again = begin(jobs_dir)
    until = time.monotonic() + 60
    while (found := queue.get(job.number)) is not None and not found.has_ended:
        assert time.monotonic() < until
        time.sleep(0.02)
    assert found is not None and found.state is State.DONE
    assert (run_dir / "stage1_embeddings.safetensors").exists()
    again.terminate()
    again.wait(30)


def test_a_run_that_is_gone_ends_and_the_process_goes_on(tmp_path: Path) -> None:
    jobs_dir = tmp_path / "jobs"
    process, queue = begin(jobs_dir), JobQueue(jobs_dir)
    gone = queue.add(tmp_path / "gone", [Step(1, ["--config", str(tmp_path / "no.yaml")])])
    run_dir = tmp_path / "run"
    good = queue.add(run_dir, [Step(1, [f"--output_dir={run_dir}"])])
    until = time.monotonic() + 60
    while not (done := queue.get(good.number)) or not done.has_ended:
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.02)
    failed = queue.get(gone.number)
    assert failed is not None and (failed.state, failed.exit_code) == (State.FAILED, 3)
    assert done.state is State.DONE
    process.terminate()
    process.wait(30)


def test_it_does_not_outlive_who_started_it(tmp_path: Path) -> None:
    """A process of which this one is not the parent."""
    process = start(tmp_path / "jobs", **{STARTED_BY: "1"})
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "serving stage 1" in said
