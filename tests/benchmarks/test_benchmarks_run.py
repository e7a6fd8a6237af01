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
    result = subprocess.run(
        [sys.executable, BENCHMARKS / "guidance.py", *small], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    ratios = re.findall(r"^  .+ s +([\d.]+) x", result.stdout, re.M)
    assert len(ratios) == 3 and float(ratios[0]) == 1.0
