"""Errors on a file end with the command that makes it, which is one that can be given."""

from pathlib import Path

import pytest

from common.files.run_files import MAKERS, how_to_remake
from common.files.stage_table import STAGES, TRAJECTORY_FILE
from common.runs.flags import all_flags
from tests.conftest import PROJECT_DIR


def test_every_file_that_a_stage_writes_has_a_maker() -> None:
    assert MAKERS.keys() == {name for stage in STAGES for name in stage.writes}


@pytest.mark.parametrize("name", MAKERS)
def test_the_command_that_makes_a_file_again(name: str) -> None:
    said = how_to_remake(Path("some/run") / name)
    assert said.startswith("make it again: python stages/")
    assert said.endswith(" --output_dir some/run")
    _, script, *arguments = said.removeprefix("make it again: ").split()
    assert (PROJECT_DIR / script).is_file()
    flags = {argument.removeprefix("--") for argument in arguments if argument.startswith("--")}
    (stage,) = (stage for stage in STAGES if script.endswith(stage.script))
    assert name in stage.writes
    assert flags <= {flag.name for flag in all_flags() if flag.is_of(stage)}
    assert ("save_trajectory" in flags) == (name == TRAJECTORY_FILE)


def test_no_command_makes_a_strangers_file() -> None:
    assert how_to_remake(Path("some/run/holiday.png")) == "make it again"
