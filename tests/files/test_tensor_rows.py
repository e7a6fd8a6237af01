"""The table of tensors covers the files of the table of stages."""

from common.files.stage_table import STAGES
from common.files.tensor_rows import DIMENSIONS, TENSORS


def test_what_stages_write_has_its_rows() -> None:
    """Every tensor file that a stage writes for another one, and letters that are explained."""
    assert {row.file for row in TENSORS} == {f for s in STAGES for f in s.writes}
    assert {letter for row in TENSORS for letter in row.shape} == DIMENSIONS.keys()


def test_a_name_stands_once_in_a_file() -> None:
    names = [(row.file, row.name) for row in TENSORS]
    assert len(set(names)) == len(names)
