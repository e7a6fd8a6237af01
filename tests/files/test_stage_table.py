"""The stages stand in one table: each reads what the one before wrote."""

from itertools import pairwise
from pathlib import Path

import pytest

from common.declared import EMBEDDINGS, LATENTS, PICTURES
from common.files.stage_table import FIRST, LAST, STAGES, Stage, maker_of, numbered
from common.runs.generation import RunSettings
from tests.conftest import PROJECT_DIR


def test_stages_are_counted_in_the_order_of_a_run() -> None:
    assert [stage.number for stage in STAGES] == list(range(1, len(STAGES) + 1))
    assert [stage.makes for stage in STAGES] == [EMBEDDINGS, LATENTS, PICTURES]
    assert FIRST is STAGES[0] and LAST is STAGES[-1]
    for stage in STAGES:
        assert maker_of(stage.makes) is stage is numbered(stage.number)


def test_a_stage_reads_what_the_one_before_writes() -> None:
    assert FIRST.reads is None
    for before, stage in pairwise(STAGES):
        assert stage.reads in before.writes
    names = [name for stage in STAGES for name in stage.writes]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_a_row_names_a_script_and_a_setting(stage: Stage) -> None:
    assert stage.command == f"python stages/{stage.script}"
    assert (PROJECT_DIR / Path(stage.command.removeprefix("python "))).is_file()
    assert stage.dtype in RunSettings.model_fields
