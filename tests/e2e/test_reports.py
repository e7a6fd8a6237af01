"""What stages report of themselves: seconds that sum to the process's own, programs, repeats."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from common.files.report import Report, json_schema
from tests.conftest import DEMO, PROJECT_DIR, STAGES, Run, run_script

TOLERANCE = 0.05  # of the wall time, as measured from outside


def run_and_measure(number: int, run_dir: Path) -> tuple[float, dict[str, Any]]:
    """Run a stage. Returns the seconds from outside and the report."""
    began = time.perf_counter()
    compiled = ["--backend", "jax"] if number > 1 else []
    result = run_script(STAGES[number], "--output_dir", run_dir, *compiled)
    seconds = time.perf_counter() - began
    assert result.returncode == 0, result.stderr
    return seconds, json.loads((run_dir / f"stage{number}_report.json").read_text())


def check_parts(seconds: float, report: dict[str, Any]) -> None:
    parts = report["seconds"]
    assert sum(parts.values()) == pytest.approx(seconds, rel=TOLERANCE)
    assert report["wall_seconds"] == pytest.approx(sum(parts.values()), abs=0.01)
    assert parts["other"] <= TOLERANCE * seconds
    assert all(value >= 0 for value in parts.values())


@pytest.mark.slow
@pytest.mark.long
def test_the_parts_sum_to_the_wall_time_cold_and_warm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run_dir = tmp_path / "run"
    seconds, report = run_and_measure(1, run_dir)
    check_parts(seconds, report)
    assert report["programs"] is None
    for number in (2, 3):
        cold_seconds, cold = run_and_measure(number, run_dir)
        warm_seconds, warm = run_and_measure(number, run_dir)
        check_parts(cold_seconds, cold)
        check_parts(warm_seconds, warm)
        assert (cold["programs"]["compiled"], cold["programs"]["from_cache"]) == (1, 0)
        assert (warm["programs"]["compiled"], warm["programs"]["from_cache"]) == (0, 1)
        assert [program["from_cache"] for program in warm["programs"]["each"]] == [True]
        assert warm["seconds"]["compile"] < cold["seconds"]["compile"]


def test_repeats_measure_the_steady_state(run_copy: Path, quick_stage: Run) -> None:
    before = {path.name: path.read_bytes() for path in run_copy.glob("stage*.safetensors")}
    settings = ("--num_inference_steps", 4, "--num_images_per_prompt", 2)
    for number, flags, steps in ((1, settings, None), (2, (), 4), (3, (), None)):
        result = quick_stage(number, "--output_dir", run_copy, "--repeat", 3, *flags)
        assert result.returncode == 0, result.stderr
        assert "3 further run(s): median" in result.stdout
        report = Report.model_validate_json((run_copy / f"stage{number}_report.json").read_text())
        assert report.repeat is not None and len(report.repeat.seconds) == 3
        ordered = sorted(report.repeat.seconds)
        assert [report.repeat.min, report.repeat.median, report.repeat.max] == ordered
        assert 0 < sum(ordered) <= report.seconds.repeats + 0.001
        if steps is not None:
            assert report.step_seconds is not None and len(report.step_seconds) == steps
            assert sum(report.step_seconds) == pytest.approx(report.seconds.run, rel=0.2)
    # Measuring changed no tensor.
    for name, content in before.items():
        assert data_of(content) == data_of((run_copy / name).read_bytes())


def data_of(safetensors: bytes) -> bytes:
    """A safetensors file's tensors, without the header, which has the time in it."""
    return safetensors[8 + int.from_bytes(safetensors[:8], "little") :]


def test_flops_are_those_of_the_steps_that_ran(finished_run: Path) -> None:
    """Beside torch's own count, which takes the zeros around a picture for numbers as well."""
    unet = UNet2DConditionModel.from_pretrained(DEMO, subfolder="unet")
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        unet(
            torch.zeros(4, 4, 16, 16),  # two images, both halves of guidance
            1,
            torch.zeros(4, 77, 160),
            added_cond_kwargs={"text_embeds": torch.zeros(4, 96), "time_ids": torch.zeros(4, 6)},
        )
    report = Report.model_validate_json((finished_run / "stage2_report.json").read_text())
    steps = 4
    assert report.flops == pytest.approx(steps * counter.get_total_flops(), rel=0.1)
    assert report.tflops_per_second == pytest.approx(
        report.flops / report.seconds.run / 1e12, rel=1e-2, abs=1e-6
    )


def test_the_schema_in_the_documentation_is_that_of_the_code() -> None:
    documented = PROJECT_DIR / "docs" / "stage_report.schema.json"
    assert documented.read_text(encoding="utf-8") == json_schema()
    for name, field in json.loads(json_schema())["$defs"]["Seconds"]["properties"].items():
        assert field.get("description"), name


def test_a_profile_or_repeats_are_measured_though_the_output_is_fresh(
    run_copy: Path, quick_stage: Run
) -> None:
    result = quick_stage(3, "--output_dir", run_copy, "--skip_fresh", "--repeat", 1)
    assert result.returncode == 0, result.stderr
    assert "because it is to be repeated" in result.stdout


def test_a_stage_leaves_with_its_code_and_all_that_it_said(tmp_path: Path) -> None:
    """The process ends without taking the interpreter apart; nothing of its output is lost."""
    command = [sys.executable, str(STAGES[2]), "--output_dir", str(tmp_path)]
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        code = subprocess.run(command, stdout=out, stderr=err).returncode
    assert code == 3
    assert (tmp_path / "err").read_text().startswith("error: ")
    assert (tmp_path / "err").read_text().endswith("\n")
