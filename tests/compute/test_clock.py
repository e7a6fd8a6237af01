"""A stage's seconds: every one belongs to one part, from the process's begin or from a run's."""

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from common.compute import clock
from common.compute.clock import StageReport, own_memory, peak_memory, process_age
from common.files.report import read_report
from tests.conftest import PROJECT_DIR

PROGRAM = """
import json, sys, time
from common.compute import clock
time.sleep(0.2)
if "ahead" in sys.argv:
    clock.count_from_now()
of_process, of_run = clock.StageReport(1), clock.StageReport(1, since_process_began=False)
print(json.dumps([of_run.wall_seconds(), of_process.wall_seconds(), clock.process_age()]))
"""


def seconds_of_a_process(*arguments: str) -> tuple[float, float, float]:
    """Seconds since one of a process's runs began, since its report's begin, and its age."""
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        capture_output=True,
        text=True,
        check=True,
        cwd=PROJECT_DIR,
    )
    of_run, of_process, age = json.loads(result.stdout)
    return of_run, of_process, age


def test_seconds_begin_with_the_process_its_turn_or_its_run() -> None:
    slept, tick = 0.2, 0.01  # seconds; the system counts a process's begin in ticks
    of_run, of_process, age = seconds_of_a_process()
    assert of_process >= of_run + slept - tick and age >= of_process - tick
    assert age - of_process < slept  # nothing of the begin is missing
    of_run, of_process, age = seconds_of_a_process("ahead")
    assert age >= of_process + slept - tick and of_process >= of_run


def test_parts_are_disjoint_and_all_there_is() -> None:
    report = StageReport(2, since_process_began=False)
    report.phase("settings")
    report.phase("other")
    with report.part("run"):
        time.sleep(0.02)
        before = report.parts()["run"]
        with report.part("device_to_host"):
            time.sleep(0.03)
        assert report.parts()["run"] < before + 0.03  # what lies within is not counted twice
    with pytest.raises(KeyError), report.part("run"):
        raise KeyError
    report.phase("imports")
    parts = report.parts()
    assert parts["run"] >= 0.02 and parts["device_to_host"] >= 0.03
    assert sum(parts.values()) == pytest.approx(report.wall_seconds(), abs=0.01)


def test_what_is_written_is_what_was_collected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = dict(shapes={}, dtype="float32", dtype_asked="auto", backend="jax", platform="cpu")
    facts |= dict(device="cpu", devices=1, versions={})
    monkeypatch.setattr(clock, "_seconds_ahead", 1.5)  # the process imported ahead

    def write(*, alone: bool, repeats: list[float]) -> None:
        report = StageReport(3, since_process_began=alone)
        with report.part("run"):
            time.sleep(0.01)
        report.count_flops("run", 1e9)
        report.count_flops("trajectory", 1e15)  # is no part of the speed
        for seconds in repeats:
            report.count_flops("repeats", 2e9)
            report.repeats.append(seconds)
        report.write(tmp_path, peak_flops=1e12, **facts)

    write(alone=True, repeats=[0.5, 0.25, 0.25])
    found = read_report(tmp_path, 3)
    assert found is not None and found.repeat is not None
    assert found.preload_seconds == 1.5
    assert (found.repeat.min, found.repeat.median, found.repeat.max) == (0.25, 0.25, 0.5)
    assert found.tflops_per_second == pytest.approx(6e9 / 1.0 / 1e12)
    assert found.share_of_peak == pytest.approx(0.006)
    assert found.flops == 1e9 and found.programs is None
    write(alone=False, repeats=[])
    found = read_report(tmp_path, 3)
    assert found is not None and found.repeat is None
    assert found.preload_seconds is None
    assert found.tflops_per_second == pytest.approx(1e9 / found.seconds.run / 1e12, rel=0.01)
    assert found.wall_seconds == pytest.approx(sum(found.seconds.model_dump().values()), abs=1e-3)


def test_memory_is_watched_while_weights_move() -> None:
    report = StageReport(2, since_process_began=False)
    kept = []
    # So large that the allocator asks the system for each, whatever was freed before.
    weights = ((str(i), torch.ones(2**24)) for i in range(3))
    for _, tensor in report.watch_memory(weights):
        kept.append(tensor.clone())
    assert report.facts["weights_bytes"] == 3 * 4 * 2**24
    assert report.facts["host_bytes_while_loading"] > 2 * 4 * 2**24


def test_the_process_is_measured_as_psutil_does() -> None:
    process = psutil.Process()
    assert process_age() == pytest.approx(time.time() - process.create_time(), abs=1.1)
    assert 0 < own_memory() <= process.memory_info().rss <= peak_memory() * 1.01
