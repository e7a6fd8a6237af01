"""`run_all.sh` by the stages of a server: the same files, and what comes of it when one ends."""

import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from filelock import FileLock

from common.files.stage_table import FIRST
from common.serving.job_queue import JOBS_FILE, JobQueue
from common.serving.warm import SERVER_LOCK, WarmServer, announced, find_warm
from tests.conftest import RUN_ALL, file_contents
from tests.serving.conftest import SMALL, Server, start_server

SEEDED = (*SMALL, "--prompt=a small green ring", "--seed=5")


def run_all(server: Server, cwd: Path, *flags: str) -> "subprocess.CompletedProcess[str]":
    process = begin(server, cwd, *flags)
    output, errors = process.communicate(timeout=240)
    return subprocess.CompletedProcess([], process.returncode, output, errors)


def begin(server: Server, cwd: Path, *flags: str) -> "subprocess.Popen[str]":
    cwd.mkdir(exist_ok=True)
    command = [sys.executable, RUN_ALL, *SEEDED, *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=cwd, env=server.environment, text=True, **pipes)


def jobs_so_far(server: Server) -> int:
    with sqlite3.connect(server.jobs_dir / JOBS_FILE) as queue:
        found = queue.execute("SELECT seq FROM sqlite_sequence").fetchone()
    return 0 if found is None else int(found[0])


@pytest.mark.slow
def test_a_warm_server_writes_the_same_files(server: Server, tmp_path: Path) -> None:
    before = jobs_so_far(server)
    by_server = run_all(server, tmp_path / "warm", "--output_dir=run")
    assert jobs_so_far(server) == before + 1
    alone = run_all(server, tmp_path / "alone", "--output_dir=run", "--warm=never")
    assert jobs_so_far(server) == before + 1
    for result in (by_server, alone):
        assert result.returncode == 0 and not result.stderr, result.stderr
    told = ("stage ", "  because", "  wrote", "picture")  # not how long the first one compiles
    said = [
        [
            line.split(" in ")[0].split(" (")[0]
            for line in result.stdout.splitlines()
            if line.startswith(told)
        ]
        for result in (by_server, alone)
    ]
    assert said[0] == said[1] and len(said[0]) == 10
    contents = [file_contents(tmp_path / name / "run") for name in ("warm", "alone")]
    reports = {name for name in contents[0] if name.endswith("_report.json")}
    assert contents[0].keys() == contents[1].keys() and len(reports) == 3
    for name in contents[0].keys() - reports:
        if not name.endswith((".safetensors", ".jsonl")):  # which have seconds
            assert contents[0][name] == contents[1][name], name
    again = run_all(server, tmp_path / "warm", "--output_dir=run")
    assert again.stdout.count("fresh") == 3


@pytest.mark.slow
def test_an_error_is_said_once_and_has_its_code(server: Server, tmp_path: Path) -> None:
    result = run_all(server, tmp_path, "--output_dir=run", "--model_id=absent")
    assert result.returncode != 0 and result.stderr.count("error: ") == 1
    assert "--model_id absent" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.slow
def test_a_signal_stops_the_stage_and_the_same_command_goes_on(
    server: Server, tmp_path: Path
) -> None:
    flags = ["--num_inference_steps=400", "--output_dir=run"]
    process = begin(server, tmp_path, *flags)
    until = time.monotonic() + 60
    while not (tmp_path / "run" / "stage1_report.json").exists():
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in errors, errors
    assert not (tmp_path / "run" / "output_image.png").exists()
    goes_on = run_all(server, tmp_path, *flags)
    assert goes_on.returncode == 0 and "goes on after step" in goes_on.stdout
    assert (tmp_path / "run" / "output_image.png").exists()


@pytest.mark.slow
def test_where_the_server_dies_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XLA_OF_THIS_TEST", "1")  # so that no other server is found
    server = start_server(tmp_path / "jobs")
    process = begin(server, tmp_path, "--num_inference_steps=400", "--output_dir=run")
    while not (tmp_path / "run" / "stage1_report.json").exists():
        assert process.poll() is None
        time.sleep(0.01)
    server.process.kill()
    output, errors = process.communicate(timeout=240)
    server.process.wait()
    assert process.returncode == 0, errors
    assert "the server is no more" in output
    assert (tmp_path / "run" / "output_image.png").exists()


def test_which_server_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    jobs_dir = tmp_path / "jobs"
    jobs_dir.mkdir()
    lock, now = FileLock(jobs_dir / SERVER_LOCK), time.time()
    with announced(jobs_dir, {}, now):
        assert find_warm({}) is None  # nobody holds its lock: it was killed
    with lock, announced(jobs_dir, {}, now):
        assert find_warm({"prompt": ["a"], "height": 64}) == WarmServer(jobs_dir=jobs_dir)
        for given in ({"repeat": 3}, {"backend": "jax"}, {"remote_vae": "http://localhost"}):
            assert find_warm(given) is None
        monkeypatch.setenv("JAX_PLATFORMS", "other")
        assert find_warm({}) is None
        monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert find_warm({}) is None  # it has ended
    with lock, announced(jobs_dir, {}, 0):
        assert find_warm({}) is None
        assert "began before the code changed: not used" in capsys.readouterr().out


def test_where_a_server_cannot_say_that_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "staged-diffusion").mkdir()
    (tmp_path / "staged-diffusion").chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with announced(tmp_path, {}, time.time()):
        pass
    assert "can be written by others" in capsys.readouterr().err
    assert find_warm({}) is None


def test_what_somebody_cancels_at_the_server_is_interrupted(tmp_path: Path) -> None:
    jobs_dir = tmp_path / "jobs"
    queue = JobQueue(jobs_dir)

    def cancel() -> None:
        own = JobQueue(jobs_dir)
        while not (jobs := own.jobs()):
            time.sleep(0.01)
        own.cancel(jobs[0].number)
        own.close()

    with FileLock(jobs_dir / SERVER_LOCK):
        cancelling = threading.Thread(target=cancel)
        cancelling.start()
        commands = {FIRST: ["python", "script", "--prompt=a"]}
        assert WarmServer(jobs_dir=jobs_dir).run_in_turn(commands, None) == 130
        cancelling.join()
    assert queue.jobs() == []


def test_run_all_imports_nothing_that_computes() -> None:
    """Its stages do; a warm server's picture would be waited for longer than it takes."""
    program = (
        "import runpy, sys\n"
        f"runpy.run_path({str(RUN_ALL)!r})\n"
        "print({'torch', 'jax', 'transformers', 'diffusers'} & sys.modules.keys())\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout == "set()\n", result.stderr
