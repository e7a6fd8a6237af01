"""Signals to stop: one sentence, the documented exit code, earlier files as they were."""

import os
import pty
import re
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from common.stopping import StoppedError, StopRequest
from tests.conftest import STAGES, file_contents

# What stage 2 shows when it has begun, and when its devices are computing.
MOMENTS = {"loading": rb"  override", "denoising": rb"[1-9]\d*/990"}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
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
        del after["stage2_progress.safetensors"]
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
    [(signal.SIGINT, "interrupted", 130), (signal.SIGTERM, "terminated", 143)],
)
def test_a_stop_that_was_asked_for_has_its_signals_code(number: int, word: str, code: int) -> None:
    request = StopRequest()
    request.raise_if_asked("after nothing")
    request.number = number
    with pytest.raises(StoppedError) as caught:
        request.raise_if_asked("after 3 images")
    assert (str(caught.value), caught.value.exit_code) == (f"{word} after 3 images", code)
