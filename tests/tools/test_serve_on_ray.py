"""The command of replicas: flags are those of a server, as arguments of `serve run` too."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray.serve")

from common.errors import BadSettingError
from tests.conftest import PROJECT_DIR
from tests.refusals import refusal
from tools import run_all
from tools.serve_on_ray import make_command, parts

TOOL = PROJECT_DIR / "tools" / "serve_on_ray.py"


def test_arguments_are_what_run_all_takes(tmp_path: Path) -> None:
    own = ["--model_id=models/demo", "--keep=3", "--output_dir", str(tmp_path), "--max_replicas=4"]
    with make_command().make_context("x", [*own, "--no_negative_prompt"]) as context:
        serving, scaling = parts(context.params)
    assert (serving.jobs_dir, serving.of_processes) == (str(tmp_path), {"keep": 3})
    assert serving.flags == {"model_id": "models/demo", "no_negative_prompt": True}
    assert (scaling.least, scaling.most, scaling.waiting) == (1, 4, 8)
    assert {p.name for p in make_command().params} >= run_all.OF_REPLICAS


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--prompt=a"], "--prompt does not go with --serve"),
        (["--min_replicas=2"], "--min_replicas 2 is more than --max_replicas 1"),
        (["--loras_dir=none"], "none"),
        (["--model_id=/none"], "--model_id /none is neither an existing folder nor a hub id"),
    ],
)
def test_what_is_refused(flags: list[str], said: str) -> None:
    with make_command().make_context("x", flags) as context, refusal(BadSettingError, said):
        parts(context.params)


def test_an_open_address_wants_a_key() -> None:
    command = [sys.executable, TOOL, "--host=0.0.0.0"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and "others can reach it: give --api_key" in result.stderr
