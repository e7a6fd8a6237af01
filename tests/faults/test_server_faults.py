"""A server and its stages, killed at any moment under load."""

import subprocess
import sys
from pathlib import Path

import pytest

SERVERS = Path(__file__).with_name("kill_servers.py")


@pytest.mark.slow
def test_no_job_of_a_server_is_lost() -> None:
    """`make faults-serving` does a hundred."""
    command = [sys.executable, SERVERS, "--kills", "10", "--clients", "6"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "10 of 10" in result.stdout and "FAULT" not in result.stdout
