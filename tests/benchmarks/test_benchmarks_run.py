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
