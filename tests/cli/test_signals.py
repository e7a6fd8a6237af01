"""Ctrl-C and a termination: one sentence, the documented exit code, earlier files as they were."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import STAGES, file_contents


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_a_stopped_stage_leaves_every_file_as_it_was(
    run_copy: Path, number: signal.Signals, code: int, word: str
) -> None:
    before = file_contents(run_copy)
    process = subprocess.Popen(
        [sys.executable, str(STAGES[2]), "--output_dir", run_copy, "--num_inference_steps", "990"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("stage 2")
    time.sleep(3)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == code, stderr
    assert stderr.splitlines()[-1].startswith(f"error: {word}; nothing was left half written")
    assert file_contents(run_copy) == before
