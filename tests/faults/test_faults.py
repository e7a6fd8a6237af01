"""Some kills and signals; `make faults` does three hundred, `make faults-serving` a hundred."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("kill_stages.py")


@pytest.mark.slow
def test_nothing_is_lost_where_rows_are_reused() -> None:
    """`make faults-rows` does sixty. Of lists that change, in turn and streamed."""
    cases = ("--case", "a changed list", "--case", "a list, streamed")
    flags = ("--kills", "2", "--signals", "0", "--seed", "1", *cases)
    result = subprocess.run([sys.executable, SCRIPT, *flags], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 kills, 0 signals" in result.stdout and ": 0 exceptions" in result.stdout


@pytest.mark.slow
def test_nothing_is_lost_or_half_written() -> None:
    cases = [flag for name in ("stage 2", "stage 3", "run_all.sh") for flag in ("--case", name)]
    flags = ("--kills", "3", "--signals", "1", "--seed", "1", *cases)
    result = subprocess.run([sys.executable, SCRIPT, *flags], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "3 kills, 1 signals" in result.stdout
    assert ": 0 exceptions" in result.stdout
