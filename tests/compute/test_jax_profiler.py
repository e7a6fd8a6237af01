"""jax's trace of a compiled program, and the modules in the names of its operations."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from jax.profiler import ProfileData

from common.compute.clock import StageReport
from common.compute.jax_profiler import JaxProfiler, module_path, operation_names
from common.compute.programs import compile_program
from common.compute.torchax_runtime import as_jax_function
from common.errors import UnfitEnvironmentError
from common.models.weights import weights_of
from tests.refusals import refusal


class Blocks(torch.nn.Module):
    """A product in each of two blocks that are named as diffusers names its own."""

    def __init__(self) -> None:
        super().__init__()
        self.down_blocks = torch.nn.ModuleList([torch.nn.Linear(256, 256) for _ in range(2)])
        self.conv_out = torch.nn.Linear(256, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.down_blocks:
            x = block(x).sin()
        return self.conv_out(x)


def test_a_window_of_steps(tmp_path: Path) -> None:
    module = Blocks().requires_grad_(False)
    weights = {name: jax.numpy.asarray(tensor.numpy()) for name, tensor in weights_of(module)}
    x = jax.numpy.ones((512, 256))
    report = StageReport(2, since_process_began=False)
    program = compile_program(
        lambda: jax.jit(as_jax_function(module)).lower(weights, x), "step", report
    )
    jax.block_until_ready(program(weights, x))
    profiler = JaxProfiler(tmp_path / "trace", range(4, 7), report, {"step": program}, module)
    profiler.start()
    for number in profiler.steps:
        with profiler.step(number):
            jax.block_until_ready(program(weights, x))
    profiler.stop()
    profile = profiler.result()
    assert profile.steps == (4, 7)
    names = {operation.module for operation in profile.operations}
    assert {"down_blocks.0", "down_blocks.1", "conv_out"} <= names
    assert all(each.count == 3 for each in profile.operations if each.module == "conv_out")
    assert sum(profile.by_block.values()) > 0
    assert report.parts()["profile"] > 0
    trace = Path(profile.trace)
    assert (
        trace.is_relative_to(tmp_path / "trace") and f"--logdir {tmp_path}" in profile.how_to_open
    )
    # By jax's own reader: the steps that were marked.
    events = [
        dict(event.stats)["step_num"]
        for plane in ProfileData.from_file(str(trace)).planes
        for line in plane.lines
        for event in line.events
        if event.name == "step"
    ]
    assert sorted(events) == [4, 5, 6]


def test_work_without_steps_is_one_itself(tmp_path: Path) -> None:
    report = StageReport(3, since_process_began=False)
    profiler = JaxProfiler(tmp_path, None, report, {}, torch.nn.Identity())
    assert list(profiler.steps) == [0]
    profiler.start()
    with profiler.step(0):
        jax.block_until_ready(jax.numpy.ones(8) * 2)
    profiler.stop()
    profile = profiler.result()
    assert profile.steps is None
    assert {operation.module for operation in profile.operations} <= {""}  # of no program of ours


def test_operations_have_the_path_of_their_scopes() -> None:
    def named(x: jax.Array) -> jax.Array:
        with jax.named_scope("mid_block"):
            return x @ x

    report = StageReport(2, since_process_began=False)
    lowered = jax.jit(named).lower(np.ones((8, 8), np.float32))
    names = dict(operation_names(compile_program(lambda: lowered, "named", report)))
    assert {module for module, _ in names} == {"jit_named"}
    assert any("mid_block" in path for path in names.values())


@pytest.mark.parametrize(
    ("op_name", "expected"),
    [
        ("jit(denoise)/mid_block/resnets.0/conv1/dot_general", "mid_block.resnets.0.conv1"),
        ("jit(denoise)/while/body/mid_block/resnets.0/add", "mid_block.resnets.0"),
        ("jit(denoise)/conv1/dot_general", ""),  # conv1 is within a resnet alone
        ("", ""),
    ],
)
def test_the_module_in_a_path(op_name: str, expected: str) -> None:
    modules = {"mid_block", "mid_block.resnets", "mid_block.resnets.0", "mid_block.resnets.0.conv1"}
    assert module_path(op_name, modules) == expected


def test_a_trace_that_cannot_be_begun(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "stage2"
    with refusal(
        UnfitEnvironmentError,
        f"--profile: no trace can be written to {folder}",
        "choose another --profile_dir",
    ):
        JaxProfiler(folder, None, StageReport(2), {}, torch.nn.Identity()).start()


def test_a_trace_that_cannot_be_ended(tmp_path: Path) -> None:
    """The folder became a file while the trace ran."""
    folder = tmp_path / "profile" / "stage2"
    profiler = JaxProfiler(folder, None, StageReport(2), {}, torch.nn.Identity())
    profiler.start()
    shutil.rmtree(tmp_path / "profile")
    (tmp_path / "profile").write_text("")
    with refusal(
        UnfitEnvironmentError,
        f"--profile: no trace can be written to {folder}",
        "choose another --profile_dir",
    ):
        profiler.stop()
    again = JaxProfiler(tmp_path / "elsewhere", None, StageReport(2), {}, torch.nn.Identity())
    again.start()
    again.stop()
    assert list((tmp_path / "elsewhere").rglob("*.xplane.pb"))
