"""The stages stand in one table: each reads what the one before wrote."""

from itertools import pairwise
from pathlib import Path

import pytest

from common.declared import EMBEDDINGS, IMAGE_LATENTS, LATENTS, PICTURES
from common.files.stage_table import FIRST, LAST, STAGES, Stage, maker_of, numbered, stages_from
from common.runs.generation import RunSettings
from tests.conftest import PROJECT_DIR


def test_stages_are_counted_in_the_order_of_a_run() -> None:
    assert [stage.number for stage in STAGES] == [1, 0, 2, 3]
    assert [stage.makes for stage in STAGES] == [EMBEDDINGS, IMAGE_LATENTS, LATENTS, PICTURES]
    assert [stage.number for stage in STAGES if stage.of_pictures] == [0]
    assert FIRST is STAGES[0] and LAST is STAGES[-1]
    for stage in STAGES:
        assert maker_of(stage.makes) is stage is numbered(stage.number)


def test_a_stage_reads_what_the_one_before_writes() -> None:
    assert FIRST.reads is None
    for before, stage in pairwise(stage for stage in STAGES if not stage.of_pictures):
        assert stage.reads in before.writes
    names = [name for stage in STAGES for name in stage.writes]
    assert len(set(names)) == len(names)


def test_parts_of_a_run() -> None:
    assert stages_from(FIRST.number, LAST.number) == [*STAGES]
    assert [stage.number for stage in stages_from(0, 2)] == [0, 2]
    assert stages_from(3, 3) == [LAST]


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_a_row_names_a_script_and_a_setting(stage: Stage) -> None:
    assert stage.command == f"python stages/{stage.script}"
    assert (PROJECT_DIR / Path(stage.command.removeprefix("python "))).is_file()
    assert stage.dtype in RunSettings.model_fields
