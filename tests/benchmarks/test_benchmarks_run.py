"""The benchmarks run; what they measure is no matter of tests."""

import re
import subprocess
import sys

import pytest

from common.files.stage_table import OF_EVERY_RUN
from tests.conftest import PROJECT_DIR

BENCHMARKS = PROJECT_DIR / "benchmarks"


@pytest.mark.slow
@pytest.mark.long
def test_guidance() -> None:
    small = ["--repeat", "1", "--batch", "1", "--num_inference_steps", "2"]
    small += ["--mesh", "single", "--mesh", "auto"]
    result = subprocess.run(
        [sys.executable, BENCHMARKS / "guidance.py", *small], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    found = re.findall(r"^  (\w+) .+\) +([\d.]+) x its .+, +([\d.]+) x the", result.stdout, re.M)
    assert [mesh for mesh, _, _ in found] == 3 * ["single"] + 3 * ["auto"]
    assert found[0][1:] == ("1.00", "1.00") and found[3][1] == "1.00"


def rows_of(*command: object) -> list[dict[str, str]]:
    """The rows of the tables that a benchmark prints, by their titles."""
    result = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = [line.strip("| ").split(" | ") for line in result.stdout.splitlines() if "|" in line]
    titles = ["", *lines[0]]
    return [dict(zip(titles, cells, strict=False)) for cells in lines[2:]]


@pytest.mark.slow
@pytest.mark.long
def test_tracing() -> None:
    (row,) = rows_of(
        *(BENCHMARKS / "tracing.py", "--model", "models/demo", "--size", 64, "--rounds", 1)
    )
    assert 0 < float(row["later / without"]) < 1


@pytest.mark.slow
@pytest.mark.long
def test_warm() -> None:
    result = subprocess.run(
        [sys.executable, BENCHMARKS / "warm.py", "--rounds", "1", "--runs", "1"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    apart = re.search(r"pictures at most (\d+)/255 apart", result.stdout)
    assert apart is not None and int(apart[1]) <= 2
    assert re.search(r"a sweep of six [\d.]+ s: [\d.]+$", result.stdout, re.M)


@pytest.mark.slow
@pytest.mark.long
def test_side_by_side() -> None:
    """The peers that do not take long to compile; all give diffusers' result."""
    small = ["--repeat", "1", "--num_inference_steps", "2"]
    peers = ["ours, jax", "ours, torch"]
    rows = rows_of(
        BENCHMARKS / "side_by_side.py",
        *(*small, f"--checkout={PROJECT_DIR}", *(f"--peer={name}" for name in peers)),
    )
    own = ["diffusers eager", *peers]
    assert [row[""] for row in rows] == [*own, *(f"{PROJECT_DIR}: {name}" for name in peers)]
    assert rows[0]["denoising loop, ratio"] == rows[0]["decoding, ratio"] == "1.00"
    for row in rows:
        assert float(row["latents differ"]) < 1e-4
        assert int(row["pictures differ"].split("/")[0]) <= 1


@pytest.mark.slow
@pytest.mark.long
def test_gpu_sdxl_on_a_cpu() -> None:
    """Weights computed by torch and by jax are the same, so are the results."""
    small = ["--tiny", "--repeat=1", "--batch=2", "--num_inference_steps=2"]
    peers = ["diffusers channels_last", "ours, jax"]
    rows = rows_of(
        BENCHMARKS / "gpu_sdxl.py", *small, "--dtype=float32", *(f"--peer={name}" for name in peers)
    )
    found = [row for row in rows if row[""] in peers]
    assert [row[""] for row in found] == peers
    for row in found:
        assert float(row["latents differ"]) < 1e-4
        assert float(row["pictures differ"].split("/")[0]) < 0.1


@pytest.mark.slow
@pytest.mark.long
def test_cold_start() -> None:
    rows = rows_of(BENCHMARKS / "cold_start.py", "--repeat=1", f"--checkout={PROJECT_DIR}")
    seconds = {
        row[""]: float(row["wall"].split()[0]) for row in rows if " s" in row.get("wall", "")
    }
    known = ("run_all.sh", f"run_all.sh of {PROJECT_DIR}", "stage 1 alone", "stage 3's floor")
    assert all(seconds[what] > 0 for what in known)
    limit = seconds["one process of diffusers"] + 2 * seconds["stage 2's floor"]
    assert seconds["one process of diffusers and twice stage 2's floor"] == pytest.approx(
        limit, abs=0.02
    )


@pytest.mark.slow
@pytest.mark.long
def test_report_overhead() -> None:
    result = subprocess.run(
        [sys.executable, BENCHMARKS / "report_overhead.py", "--repeat", "1"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    shares = re.findall(r"^(stage \d) +report ([\d.]+)% of the wall time", result.stdout, re.M)
    assert [stage for stage, _ in shares] == [stage.name for stage in OF_EVERY_RUN]
    assert all(0 < float(share) < 100 for _, share in shares)


@pytest.mark.slow
@pytest.mark.long
def test_a_run_of_many_pictures() -> None:
    """`make lists` makes ten thousand."""
    small = ["--pictures", "300", "--beside", "60"]
    command = [sys.executable, BENCHMARKS / "large_run.py", *small]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    found = re.findall(r"^stage (\d): ([\d.]+) of the memory of 60", result.stdout, re.M)
    assert [number for number, _ in found] == ["2", "3"]


@pytest.mark.slow
@pytest.mark.long
def test_a_changed_list() -> None:
    """Rows, bits and differences; how long it takes beside the first is for five hundred."""
    small = ["--prompts", "24", "--num_inference_steps", "2", "--batch_size", "4"]
    command = [sys.executable, BENCHMARKS / "lists.py", *small]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "rows made by stage: {1: 12, 2: 12, 3: 12}; 19 kept to the bit" in result.stdout
