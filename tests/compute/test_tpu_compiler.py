"""Compiling for a TPU that is not there, as far as that goes without its compiler."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from common.compute import sharding, tpu_compiler
from common.compute.chips import CHIPS, Chip
from common.compute.sharding import SINGLE, make_mesh
from common.compute.tpu_compiler import EstimateOf, chip_of, compile_and_say
from common.compute.tpu_estimate import Estimate
from common.compute.tpu_schedule import Scheduled
from common.errors import BadSettingError, UnfitEnvironmentError
from tests.refusals import call, refusal


@pytest.mark.parametrize(("topology", "chip"), [("v6e:2x4", "v6e"), ("v5e:1x1", "v5e")])
def test_the_chip_of_a_topology(topology: str, chip: str) -> None:
    assert chip_of(topology) is CHIPS[chip]


@pytest.mark.parametrize("topology", ["v6e", "v6e:8", "v3:2x2", "v6e:2x", "v6e:2x2x2x2", ""])
def test_a_topology_that_is_not_understood(topology: str) -> None:
    with pytest.raises(BadSettingError, match="such as v6e:2x4 \\(chips: v6e, v5e\\)"):
        chip_of(topology)


def test_an_estimate_is_said_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A program for the CPU, with figures that only the compiler for TPUs writes into one."""
    chip = CHIPS["v6e"]

    def estimate(hlo: str, given: Chip) -> tuple[Estimate, Estimate]:
        assert given is chip and hlo.startswith("HloModule jit_program")
        once, step = Estimate("v6e"), Estimate("v6e")
        once.seconds["other"], step.seconds["attention"] = 0.5, 0.1
        step.seconds["collectives"], step.cycles = 0.15, 3e6
        step.collectives, step.collective_bytes = {"all-gather": 2}, {"all-gather": 5_000_000}
        return once, step

    def schedule(
        hlo: str, given: Chip, grid: list[tuple[int, ...]], latencies: tuple[float, ...]
    ) -> list[tuple[Scheduled, Scheduled]]:
        assert given is chip and hlo.startswith("HloModule jit_program") and len(grid) == 4
        found = []
        for latency in latencies:
            once, step = Scheduled(), Scheduled()
            once.seconds["other"], step.seconds["attention"] = 0.5, 0.1
            step.seconds["collectives"], step.hidden = 0.05 + 1e4 * latency, 0.03
            found.append((once, step))
        return found

    def program(x: jax.Array) -> jax.Array:
        return jnp.tanh(x) @ x

    monkeypatch.setattr(tpu_compiler.tpu_estimate, "estimate", estimate)
    monkeypatch.setattr(tpu_compiler.tpu_schedule, "schedule", schedule)
    hlo_file, json_file = tmp_path / "program.txt", tmp_path / "estimate.json"
    compile_and_say(
        lambda: jax.jit(program).lower(np.ones((64, 64), np.float32)),
        EstimateOf(
            title="one step of a model",
            topology="v6e:2x2",
            chip=chip,
            mesh=make_mesh(SINGLE | {"cfg": 2, "rows": 2}, jax.devices()),
            images=3,
            steps=10,
        ),
        hlo_file=hlo_file,
        json_file=json_file,
    )
    content: dict[str, Any] = json.loads(json_file.read_text())
    assert content["images_per_second"] == pytest.approx(3 / (0.5 + 10 * 0.2))
    assert content["step"]["scheduled"]["hidden"] == 0.03
    assert content["seconds_by_latency"] == pytest.approx({"1": 0.16, "5": 0.2, "10": 0.25})
    assert (content["mesh"], content["chips"], content["fits"]) == ("cfg=2,rows=2", 4, True)
    assert content["memory_bytes"]["arguments"] == content["memory_bytes"]["outputs"] == 64 * 64 * 4
    assert content["compile_seconds"] > 0 and content["trace_seconds"] > 0
    assert hlo_file.read_text().startswith("HloModule jit_program")
    said = capsys.readouterr().out
    assert said.startswith("one step of a model: an estimate without a TPU")
    for words in (
        "v6e:2x2, 4 chip(s), mesh cfg=2,rows=2, 3 image(s)",
        "of 32 GB a chip",
        "one step   200.00 ms by its schedule, a plain sum of 250.00 ms; 3.0 M cycles",
        "attention     100.00 ms  50.0%",
        "collectives   100.00 ms  50.0%  besides 30.00 ms hidden: 2 all-gather (5.0 MB)",
        "before     500.00 ms once",
        "latency    160.00 ms with 1 µs, 200.00 ms with 5 µs, 250.00 ms with 10 µs",
        "1.20 images/s with 10 steps",
    ):
        assert words in said, said


@pytest.mark.parametrize("topology", ["v6e", "v9:2x2", "v6e:8", "2x4", ""])
def test_an_unknown_topology_is_one_sentence(topology: str) -> None:
    assert chip_of("v5e:2x2") is CHIPS["v5e"]
    with pytest.raises(BadSettingError, match=r"--topology .*chips: v6e, v5e"):
        chip_of(topology)


@pytest.mark.parametrize("number", [2, 3])
def test_no_tpu_compiler(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "libtpu", None)
    assert importlib.util.find_spec("libtpu") is None
    with refusal(UnfitEnvironmentError, "--topology needs the TPU compiler", "pip install"):
        call(number, "--topology", "v6e:1x1")


def test_a_grid_that_the_compiler_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler's own error, where there is no compiler to give it."""

    def refuse(**_: object) -> None:
        raise RuntimeError("INVALID_ARGUMENT: topology 3x5\n is not supported")

    monkeypatch.setattr(topologies, "get_topology_desc", refuse)
    with refusal(
        BadSettingError,
        "--topology v6e:3x5: the TPU compiler refuses it",
        "topology 3x5 is not supported",
        "choose another grid",
    ):
        tpu_compiler.devices_of("v6e:3x5")


@dataclasses.dataclass
class Lowered:
    """A traced program whose compilation fails as the TPU compiler's does."""

    said: str

    def compile(self) -> None:
        raise RuntimeError(self.said)


def compile_failing(said: str, folder: Path) -> None:
    mesh = sharding.make_mesh(sharding.SINGLE, jax.devices())
    tpu_compiler.compile_and_say(
        lambda: Lowered(said),
        tpu_compiler.EstimateOf(
            title="one step of models/demo",
            topology="v5e:1x1",
            chip=CHIPS["v5e"],
            mesh=mesh,
            images=1,
            steps=1,
        ),
        hlo_file=folder / "program.txt",
        json_file=folder / "estimate.json",
    )


def test_a_program_that_does_not_fit_into_the_chip(tmp_path: Path) -> None:
    """The compiler's own error of a program that is too large, and any other one of it."""
    gigabytes = CHIPS["v5e"].memory_bytes / 1e9
    with refusal(
        UnfitEnvironmentError,
        f"one step of models/demo does not fit into the {gigabytes:.0f} GB of a v5e",
        "Used 40.1G of 15.7G hbm",
        "fewer pictures at once, or more chips",
    ):
        compile_failing("RESOURCE_EXHAUSTED: Ran out of memory:\nUsed 40.1G of 15.7G hbm", tmp_path)
    with pytest.raises(RuntimeError, match="INTERNAL"):
        compile_failing("INTERNAL: a defect of the compiler", tmp_path)
    assert not list(tmp_path.iterdir())
