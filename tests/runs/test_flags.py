"""Flags: a help page that reads well at 80 columns, each flag once, spelled in either way."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import BadSettingError
from common.files.stage_table import DENOISE
from common.runs.flags import Given
from tests.conftest import RUN_ALL, STAGES, Run
from tests.refusals import expect, refusal


@pytest.mark.parametrize("script", [*STAGES.values(), RUN_ALL], ids=lambda path: path.stem)
def test_help_fits_80_columns(script: str) -> None:
    environment = os.environ | {"COLUMNS": "80", "NO_COLOR": "1"}
    result = subprocess.run(
        [sys.executable, str(script), "--help"], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert not re.findall(r"^│ {10,}\S", result.stdout, re.M), "a meaning takes one line"
    flags = re.findall(r"^│ (--\w+)", result.stdout, re.M)
    assert len(flags) == len(set(flags)) > 8
    assert not [flag for flag in flags if "-" in flag[2:]], "flags are spelled with underscores"
    for group in ("Model", "Files", "Running"):
        assert f"─ {group} ─" in result.stdout
    if script in (STAGES[1], RUN_ALL):
        assert "[7.5]" in result.stdout
        assert "[the checkpoint's own]" in result.stdout


def test_hyphens_work_in_flags_as_well(run_copy: Path, stage: Run) -> None:
    expect(
        stage(2, "--output-dir", run_copy, "--num-inference-steps", "0"),
        *(2, "--num_inference_steps"),
    )


def test_a_bad_value_of_any_flag_is_named() -> None:
    with refusal(BadSettingError, "--progress 'xml'"):
        _ = Given(DENOISE, {"progress": "xml"}).flags
    assert Given(DENOISE, {"progress": "json", "wait": True}).flags.progress == "json"
