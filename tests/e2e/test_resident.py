"""One process that keeps its models does what a process for each stage does, to the bit."""

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.compute.kept import Kept
from common.files.report import read_report
from common.files.stage_table import OF_EVERY_RUN
from common.runs.stage_run import ResidentStage
from tests.conftest import PROJECT_DIR, xla_flags
from tests.e2e.compare_checkouts import contents, make_files, run, runs_of


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[Any, str]]:
    return runs_of(make_files(tmp_path_factory.mktemp("checkpoints")))


@pytest.fixture(scope="module")
def residents() -> list[ResidentStage]:
    """All stages in this process, with what they keep in common."""
    kept = Kept()
    stages = [ResidentStage(stage, kept) for stage in OF_EVERY_RUN]
    for stage in stages:
        stage.open()
    return stages


def flags_of(flags: dict[Any, str], number: int, run_dir: Path) -> list[str]:
    return [*shlex.split(flags.get(number, "")), "--output_dir", str(run_dir)]


def run_residents(residents: list[ResidentStage], flags: dict[Any, str], run_dir: Path) -> int:
    """Do one run. Returns how many programs were compiled, or came from the cache."""
    for stage in residents:
        stage.run(*flags_of(flags, stage.stage.number, run_dir))
    reports = [read_report(run_dir, stage.number) for stage in OF_EVERY_RUN]
    programs = [report.programs for report in reports if report is not None]
    assert len(programs) == len(OF_EVERY_RUN)
    return sum(each.compiled + each.from_cache for each in programs if each is not None)


def check_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys() and len(found) >= 4
    assert not [name for name in found if not np.array_equal(found[name], expected[name])]


@pytest.mark.slow
@pytest.mark.long
def test_runs_in_turn_give_the_bits_of_the_scripts_and_compile_once(
    runs: dict[str, dict[Any, str]],
    residents: list[ResidentStage],
    tmp_path: Path,
) -> None:
    """Other checkpoints, LoRAs, embeddings, schedulers, sizes, guidance, dtypes, backends."""
    chosen = tuple(runs)
    assert len(chosen) == 12
    compiled = [
        run_residents(residents, runs[name], tmp_path / f"resident {k}")
        for k, name in enumerate(chosen)
    ]
    # The rest are compared with runs in other company, below.
    for k, name in [*enumerate(chosen)][::3]:
        run_dir = tmp_path / f"scripts {k}"
        for stage in OF_EVERY_RUN:
            own = flags_of(runs[name], stage.number, run_dir)
            result = run(PROJECT_DIR, stage.number, own, {"XLA_FLAGS": xla_flags(8)})
            assert result.returncode == 0, result.stderr
        check_equal(contents(tmp_path / f"resident {k}"), contents(run_dir))
    assert sum(compiled) > 6
    for k, name in reversed(list(enumerate(chosen))):
        again = tmp_path / f"again {k}"
        assert run_residents(residents, runs[name], again) == 0
        check_equal(contents(again), contents(tmp_path / f"resident {k}"))
