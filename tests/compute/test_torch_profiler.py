"""torch's trace of a module, by its submodules."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from common.compute.clock import StageReport
from common.compute.torch_profiler import TorchProfiler
from common.errors import UnfitEnvironmentError
from tests.refusals import refusal


def test_operations_belong_to_the_innermost_module(tmp_path: Path) -> None:
    model = torch.nn.Sequential(
        torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU()), torch.nn.Linear(64, 64)
    )
    report, file = StageReport(1, since_process_began=False), tmp_path / "below" / "trace.json.gz"
    profiler = TorchProfiler(file, range(2, 4), report, {"model": model})
    x = torch.ones(128, 64)
    model(x)
    profiler.start()
    with torch.inference_mode():
        for number in profiler.steps:
            with profiler.step(number):
                model(x)
    profiler.stop()
    profile = profiler.result()
    found = {
        (operation.name, operation.module): operation.count for operation in profile.operations
    }
    assert found["aten::addmm", "model.0.0"] == found["aten::addmm", "model.1"] == 2
    assert found["aten::clamp_min", "model.0.1"] == 2
    busy = sum(profile.by_block.values())
    assert 0 < busy <= profile.window_seconds
    assert busy + profile.idle_seconds == pytest.approx(profile.window_seconds, rel=0.15)
    assert profile.steps == (2, 4)
    with gzip.open(file) as opened:
        names = {event.get("name") for event in json.load(opened)["traceEvents"]}
    assert {"step: 2", "step: 3", "module: model.0.0"} <= names
    # Nothing of the profiler stays at the modules.
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_trace_of_torch_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "stage1"
    profiler = TorchProfiler(folder / "trace.json.gz", None, StageReport(1), {})
    profiler.start()
    with refusal(UnfitEnvironmentError, f"--profile: {folder}", "choose another --profile_dir"):
        profiler.stop()
