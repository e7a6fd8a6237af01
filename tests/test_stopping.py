"""Signals to stop: one sentence, the documented exit code, earlier files as they were."""

import os
import pty
import re
import signal
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from common.stopping import (
    STOP_SIGNALS,
    StoppedError,
    StopRequest,
    hold_signals,
    stop_now,
    stopping_at_once,
)
from tests.conftest import LONG, PROJECT_DIR, STAGES, file_contents

# What stage 2 shows when it has begun, and when its devices are computing.
MOMENTS = {"loading": rb"  override", "denoising": rb"[1-9]\d*/990"}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize(
    ("number", "code", "word"),
    [
        (signal.SIGINT, 130, "interrupted"),
        pytest.param(signal.SIGTERM, 143, "terminated", marks=LONG),
    ],
)
def test_a_stopped_stage_leaves_every_file_as_it_was(
    run_copy: Path, number: signal.Signals, code: int, word: str, moment: str
) -> None:
    before = file_contents(run_copy)
    terminal, its_end = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 80))  # progress bars show nothing without a width
    process = subprocess.Popen(
        [
            *(sys.executable, str(STAGES[2]), "--output_dir", run_copy),
            *("--num_images_per_prompt", "8", "--num_inference_steps", "990"),
        ],
        env=os.environ | {"XLA_FLAGS": ""},
        stdout=its_end,
        stderr=its_end,
    )
    os.close(its_end)
    shown = b""
    while not re.search(MOMENTS[moment], shown):
        shown += os.read(terminal, 4096)
    process.send_signal(number)
    while more := read_or_end(terminal):
        shown += more
    assert process.wait(timeout=60) == code, shown.decode()
    last = shown.decode().splitlines()[-1]
    after = file_contents(run_copy)
    if moment == "denoising":
        assert re.match(rf"error: {word} after step \d+ of 990, which are kept", last)
        del after["stage2_progress.safetensors"], after["stage2_progress/made_by.json"]
    else:
        assert last.startswith(f"error: {word}; nothing was left half written")
    assert after == before


def read_or_end(terminal: int) -> bytes:
    """What a terminal shows next; nothing once its other end is closed."""
    try:
        return os.read(terminal, 4096)
    except OSError:
        return b""


@pytest.mark.parametrize(
    ("number", "word", "code"),
    [
        (signal.SIGINT, "interrupted", 130),
        (signal.SIGTERM, "terminated", 143),
        (signal.SIGHUP, "hung up", 129),
    ],
)
def test_a_stop_that_was_asked_for_has_its_signals_code(number: int, word: str, code: int) -> None:
    request = StopRequest()
    request.raise_if_asked("after nothing")
    request.number = number
    with pytest.raises(StoppedError) as caught:
        request.raise_if_asked("after 3 images")
    assert (str(caught.value), caught.value.exit_code) == (f"{word} after 3 images", code)


STEPS = """
import sys, time
from common.stopping import finishing_first, stop_at_once_on_signals, stop_now, stopping_at_once

stop_at_once_on_signals()
print("begun", flush=True)
with finishing_first() as stop:
    {body}
"""
# Python's handlers run, but what runs is to be finished first.
STEPPING = """
    for step in range(200):
        time.sleep(0.01)
        if stop.number is not None and step > 100:
            stop.raise_if_asked("after what ran")
"""
# Nothing returns to Python for a minute, as in a compiler.
COMPILING = """
    with stopping_at_once("compiling a program"):
        import hashlib
        hashlib.pbkdf2_hmac("sha256", b"a", b"b", 10**9)
"""


def start(body: str, **options: Any) -> "subprocess.Popen[str]":
    """A process that does a block until it is stopped; it has begun by then."""
    process = subprocess.Popen(
        [sys.executable, "-c", STEPS.format(body=body)],
        cwd=PROJECT_DIR,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    time.sleep(0.1)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_one_signal_that_comes_twice_is_one(number: signal.Signals) -> None:
    """From its group and from the process that began it, some milliseconds apart."""
    process = start(STEPPING)
    for _ in range(3):
        process.send_signal(number)
        time.sleep(0.1)
    _, said = process.communicate(timeout=30)
    assert said.count("stopping when what runs is done") == 1
    assert "StoppedError" in said and "after what ran" in said


def test_a_signal_again_later_stops_at_once() -> None:
    process = start(STEPPING.replace("range(200)", "range(2000)").replace("> 100", "> 1900"))
    process.send_signal(signal.SIGTERM)
    time.sleep(1.2)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=5)
    assert process.returncode == 143
    ends = "error: terminated; nothing was left half written, the same command starts again\n"
    assert said.endswith(ends)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_while_nothing_returns_to_python_ends_the_process(number: int, code: int) -> None:
    process = start(COMPILING)
    process.send_signal(number)
    _, said = process.communicate(timeout=10)
    assert process.returncode == code
    assert "nothing was left half written" in said


def test_what_compiles_for_long_says_so() -> None:
    shorter = "    import common.stopping\n    common.stopping.SECONDS_UNTIL_SAID = 0.2\n"
    process = start(COMPILING.replace("    with", f"{shorter}    with"))
    assert process.stdout is not None
    assert process.stdout.readline() == "  compiling a program for 0 s now\n"
    process.kill()
    process.communicate()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_the_parent_ignores_stays_ignored(number: int) -> None:
    """As `nohup` has it; Python's own handlers are set by then."""

    def ignore() -> None:
        signal.signal(signal.SIGQUIT, signal.SIG_DFL)  # else a shell would have it unasked
        signal.signal(number, signal.SIG_IGN)

    process = start(STEPPING, preexec_fn=ignore)
    process.send_signal(number)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert said.count("stopping when what runs is done") == 1
    assert "terminated after what ran" in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_before_a_script_can_hear_it_is_heard_when_it_can(number: int) -> None:
    """As `run_all.sh` starts its stages: no import ends with a traceback, and nothing is lost."""
    script = (
        "import time; time.sleep(0.5); print('hears', flush=True);"
        "from common.stopping import stop_at_once_on_signals as hear; hear(); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=PROJECT_DIR,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hold_signals,
    )
    process.send_signal(number)
    said, complained = process.communicate(timeout=30)
    word, code = STOP_SIGNALS[number]
    assert process.returncode == code and said == "hears\n"
    assert complained.startswith(f"error: {word}; nothing was left half written")


def test_what_a_shell_starts_beside_itself_hears_an_interruption() -> None:
    """Such a shell has SIGINT and SIGQUIT ignored there, whatever anybody asked for."""

    def as_behind_an_ampersand() -> None:
        for number in (signal.SIGINT, signal.SIGQUIT):
            signal.signal(number, signal.SIG_IGN)

    process = start(STEPPING, preexec_fn=as_behind_an_ampersand)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert "interrupted after what ran" in said


def test_what_stops_at_once_leaves_no_thread_and_no_open_file() -> None:
    before = threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))
    handler = signal.signal(signal.SIGTERM, stop_now)
    try:
        for _ in range(3):
            with stopping_at_once("nothing"):
                assert threading.active_count() == before[0] + 1
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert (threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))) == before


def test_in_a_process_of_somebody_else_signals_stay_theirs() -> None:
    """As in a notebook, whose kernel an interruption is not to end."""
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt), stopping_at_once("nothing"):
        assert threading.active_count() == before
        signal.raise_signal(signal.SIGINT)
