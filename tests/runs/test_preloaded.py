"""A stage imports its libraries while the one before it runs, and nothing else changes by it."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from common.runs.preloaded import PreloadedStage
from tests.conftest import DEMO, RUN_ALL, STAGES, Run

SCRIPT = """
import json, sys, time
from common.compute import clock
modules = [name for name in ("with_a_sign", "chunk_that_is_not") if name in sys.modules]
stage = clock.StageReport(1)
print(json.dumps([sys.argv, modules, stage.wall_seconds(), __name__, sys.stdin.read()]))
sys.exit(7)
"""


@pytest.fixture
def script(tmp_path: Path) -> str:
    (tmp_path / "script.py").write_text(SCRIPT)
    return str(tmp_path / "script.py")


@pytest.fixture
def sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is written by importing `with_a_sign`, or trying `broken_with_a_sign`."""
    file = tmp_path / "sign"
    gives_it = f"open({str(file)!r}, 'w')"
    (tmp_path / "with_a_sign.py").write_text(gives_it)
    (tmp_path / "broken_with_a_sign.py").write_text(f"{gives_it}; raise ValueError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return file


def test_it_runs_the_script_with_its_arguments(
    script: str, sign: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ahead = PreloadedStage(script, ["with_a_sign"])
    wait_for(sign.exists)
    turn = time.perf_counter()
    process = ahead.begin(["--prompt=ein Stern ★", "--wait"])
    assert process is not None and process.wait() == 7
    ended = time.perf_counter()
    arguments, modules, seconds, name, heard = json.loads(capfd.readouterr().out)
    assert arguments == [script, "--prompt=ein Stern ★", "--wait"]
    assert modules == ["with_a_sign"] and name == "__main__" and heard == ""
    assert seconds < ended - turn  # counted from its turn, not from its start


def test_a_library_that_cannot_be_imported_is_left_to_the_stage(
    script: str, sign: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ahead = PreloadedStage(script, ["broken_with_a_sign", "chunk_that_is_not"])
    wait_for(sign.exists)
    process = ahead.begin([])
    assert process is not None and process.wait() == 7
    heard = capfd.readouterr()
    assert json.loads(heard.out)[1] == [] and heard.err == ""


def test_a_turn_that_comes_at_once_imports_nothing_ahead(
    script: str, capfd: pytest.CaptureFixture[str]
) -> None:
    process = PreloadedStage(script, ["chunk_that_is_not"]).begin([])
    assert process is not None and process.wait() == 7
    assert json.loads(capfd.readouterr().out)[1] == []


def test_a_signal_that_the_parent_ignores_stays_ignored(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As `trap '' INT` has it in a shell."""
    (tmp_path / "script.py").write_text("import signal; print(signal.getsignal(signal.SIGINT))")
    for ignored in (False, True):
        before = signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.SIG_DFL)
        try:
            process = PreloadedStage(str(tmp_path / "script.py"), []).begin([])
        finally:
            signal.signal(signal.SIGINT, before)
        assert process is not None and process.wait() == 0
        assert int(capfd.readouterr().out) == (signal.SIG_IGN if ignored else signal.SIG_DFL)


def test_one_that_is_no_more_is_said(script: str) -> None:
    ahead = PreloadedStage(script, [])
    ahead.process.kill()
    ahead.process.wait()
    assert ahead.begin([]) is None


def test_one_whose_turn_does_not_come_ends(script: str) -> None:
    ahead = PreloadedStage(script, ["torch"])
    ahead.give_up()
    assert ahead.process.returncode == -signal.SIGKILL
    ahead = PreloadedStage(script, [])
    assert ahead.process.stdin is not None
    ahead.process.stdin.close()  # as the end of the process that began it does
    assert ahead.process.wait(timeout=20) == 0


def test_reports_tell_it(finished_run: Path) -> None:
    reports = [json.loads((finished_run / f"stage{n}_report.json").read_text()) for n in (1, 2, 3)]
    assert reports[0]["preload_seconds"] is None
    assert reports[1]["preload_seconds"] > 0 and reports[2]["preload_seconds"] > 0
    for report in reports:
        assert sum(report["seconds"].values()) == pytest.approx(report["wall_seconds"], abs=0.01)


def processes_of(session: int) -> list[psutil.Process]:
    """The living processes that one started in a session of its own has begun."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, ProcessLookupError):
            continue
    return found


def start(*arguments: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, str(RUN_ALL), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(what: object, seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not what():  # type: ignore[operator]
        assert time.monotonic() < until
        time.sleep(0.05)


def waiting(session: int) -> list[psutil.Process]:
    found = []
    for process in processes_of(session):
        with suppress(psutil.Error):  # it has just ended
            if any("preloaded" in argument for argument in process.cmdline()):
                found.append(process)
    return found


def test_a_failed_stage_takes_the_waiting_one_with_it(tmp_path: Path) -> None:
    embedding = tmp_path / "other.safetensors"
    save_file({"emb_params": torch.zeros(1, 5)}, embedding)  # of another family
    process = start("--output_dir", tmp_path / "run", "--embedding", embedding)
    wait_for(lambda: waiting(process.pid))
    assert process.wait() == 3
    assert not waiting(process.pid)
    _, errors = process.communicate()
    assert "--embedding" in errors


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_run_leaves_nobody_waiting(number: int, tmp_path: Path) -> None:
    process = start("--output_dir", tmp_path / "run")
    wait_for(lambda: waiting(process.pid))
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as the terminal does
    else:
        process.send_signal(number)
    _, errors = process.communicate()
    code = process.returncode
    assert code == {signal.SIGINT: 130, signal.SIGTERM: 143}.get(number, -signal.SIGKILL)
    assert "Traceback" not in errors
    wait_for(lambda: not waiting(process.pid))


def test_a_stage_that_was_preloaded_writes_the_same(
    finished_run: Path, run_copy: Path, stage: Run
) -> None:
    result = stage(2, "--output_dir", run_copy)
    assert result.returncode == 0, result.stderr
    both = [folder / "stage2_latents.safetensors" for folder in (finished_run, run_copy)]
    first, second = (load_file(path)["latents"] for path in both)
    assert first.equal(second)


def test_offline_reaches_the_libraries_that_are_imported_ahead(tmp_path: Path) -> None:
    process = start("--output_dir", tmp_path / "run", "--offline", "--model_id", DEMO)
    wait_for(lambda: waiting(process.pid))
    (ahead,) = waiting(process.pid)
    assert str(STAGES[2]) in ahead.cmdline()
    assert ahead.environ()["HF_HUB_OFFLINE"] == "1"
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
