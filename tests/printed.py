"""What programs print and files say, read back."""

import json
import subprocess
from pathlib import Path
from typing import Any

from safetensors import safe_open

from tests.conftest import run_script


def header_of(path: Path) -> dict:
    """The header of ours in a file of tensors."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["staged_diffusion"])


def ran(result: "subprocess.CompletedProcess[str]") -> list[int]:
    """Which stages ran, by what the program printed."""
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("stage ")]
    assert len(lines) in (3, 4)  # those of pictures have one more
    return [int(line[6]) for line in lines if "fresh" not in line]


def as_json(script: Path, *arguments: object, code: int = 0) -> Any:
    """What a program prints with `--json`."""
    result = run_script(script, *arguments, "--json")
    assert result.returncode == code, result.stderr
    return json.loads(result.stdout)


def states(content: Any) -> dict[str, tuple[str, str]]:
    """Of each file of a run, as `inspect_run.py --json` has it: its state, and why."""
    return {file["name"]: (file["state"], file["why"]) for file in content["files"]}
