"""Tensors of a step take the memory of the step before."""

import platform
import subprocess
import sys

import pytest

from tests.conftest import PROJECT_DIR

PROGRAM = """
import resource, sys, torch
from common.compute.allocator import keep_freed_memory

if "keep" in sys.argv:
    keep_freed_memory()
hidden = torch.randn(5, 1024, 64).bfloat16()

def step():
    scores = hidden @ hidden.transpose(1, 2)
    weights = scores.float().softmax(-1).bfloat16()
    return weights @ hidden

def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with torch.inference_mode():
    faults(2)
    print(faults(10))
"""


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's own setting")
def test_memory_that_was_freed_is_not_cleared_anew() -> None:
    """Scores of 10 and 20 MB, asked for and freed in turn, by the pages that the system clears.

    One process in some has its heap in such parts that it still gives a few back.
    """

    def faults(*arguments: str) -> int:
        command = [sys.executable, "-c", PROGRAM, *arguments]
        result = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT_DIR)
        assert result.returncode == 0, result.stderr
        return int(result.stdout)

    freed = faults()
    assert any(faults("keep") < 0.3 * freed for _ in range(5))
