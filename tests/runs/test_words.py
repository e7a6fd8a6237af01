"""A stage's own words: why it runs, and where its time went."""

from pathlib import Path

import pytest

from common.compute.clock import StageReport
from common.runs.words import say_times, say_why


def test_it_says_why_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    say_why(None, {}, {})
    assert capsys.readouterr().out == ""
    say_why("seed 42 → 43", {"eta": [0.0, 0.5]}, {"seed": [1, 42]})
    assert capsys.readouterr().out.splitlines() == [
        "  because seed 42 → 43",
        "  drops what was made with seed 42, in place of the run's own: --keep_overrides goes on "
        "with it",
        "  override, for this run of this stage: eta 0.0 → 0.5",
    ]


def test_it_says_what_it_wrote_and_measured(capsys: pytest.CaptureFixture[str]) -> None:
    report = StageReport(2)
    with report.part("run"):
        pass
    say_times(report, Path("run/file"))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("  wrote run/file in ") and "run 0.0" in line
    report.repeats += [0.5, 0.25, 1.0]
    say_times(report, Path("run/file"))
    assert capsys.readouterr().out.splitlines()[1] == (
        "  3 further run(s): median 0.5000 s, 0.2500 to 1.0000"
    )
