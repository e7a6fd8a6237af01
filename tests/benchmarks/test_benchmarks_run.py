"""The benchmarks run; what they measure is no matter of tests."""

import re
import subprocess
import sys

import pytest

from tests.conftest import PROJECT_DIR

BENCHMARKS = PROJECT_DIR / "benchmarks"


@pytest.mark.slow
def test_guidance() -> None:
    small = ["--repeat", "1", "--batch", "1", "--num_inference_steps", "2"]
    small += ["--mesh", "single", "--mesh", "auto"]
    result = subprocess.run(
        [sys.executable, BENCHMARKS / "guidance.py", *small], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    found = re.findall(r"^  (\w+) .+\) +([\d.]+) x its .+, +([\d.]+) x the", result.stdout, re.M)
    assert [mesh for mesh, _, _ in found] == 3 * ["single"] + 3 * ["auto"]
    assert found[0][1:] == ("1.00", "1.00") and found[3][1] == "1.00"


@pytest.mark.slow
def test_side_by_side() -> None:
    """Every peer but the one that takes minutes to compile; all give diffusers' result."""
    small = ["--repeat", "1", "--num_inference_steps", "2"]
    small += ["--peer", "torchax per step", "--peer", "ours, jax"]
    result = subprocess.run(
        [sys.executable, BENCHMARKS / "side_by_side.py", *small], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    rows = [line.split(" | ") for line in result.stdout.splitlines() if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == ["| diffusers eager", "| torchax per step", "| ours, jax"]
    assert rows[0][2] == rows[0][4] == "1.00"
    for row in rows:
        assert float(row[6]) < 1e-4 and int(row[7].split("/")[0]) <= 1
