"""Files written row by row are those that are written at once."""

from pathlib import Path

import pytest
import torch

from common.errors import NotFiniteError, StageError
from common.files import artifacts, row_reader
from common.files.artifacts import Row
from common.files.stage_table import EMBEDDINGS_FILE
from common.files.tensor_writer import written_in_parts
from tests.files.test_artifacts import make_recipe
from tests.refusals import refusal

ROWS = [f"{k:064x}" for k in range(5)]


def rows_of(count: int) -> list[Row]:
    return [Row(fingerprint, "") for fingerprint in ROWS[:count]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_give_the_file_that_whole_tensors_give(tmp_path: Path, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"prompt_embeds": (5, 3, 7), "negative_prompt_embeds": (5, 3, 7), "pooled": (5, 3)}
    tensors = {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()
    }
    whole, parts = tmp_path / "whole" / EMBEDDINGS_FILE, tmp_path / "parts" / EMBEDDINGS_FILE
    artifacts.save_tensors(whole, tensors, make_recipe(seed=1), {"prompt": "a “red” star"}, ROWS)
    recipe, seconds = make_recipe(seed=1), [0.25, None, 1.5, 2.0, 1e-3]
    rows = [Row(*pair, k) for k, pair in enumerate(zip(ROWS, ROWS, seconds, strict=True))]
    with written_in_parts(parts, recipe, {"prompt": "a “red” star"}, rows) as written:
        written.lay_out({"": {name: tensor[:1] for name, tensor in tensors.items()}})
        for first, end in ((0, 1), (1, 4), (4, 5)):
            assert not parts.exists()
            written.put({name: tensor[first:end] for name, tensor in tensors.items()})
    assert written.shapes == {name: list(shape) for name, shape in shapes.items()}
    expected, found = artifacts.inspect(whole), artifacts.inspect(parts)
    assert found.data_sha256 == expected.data_sha256
    assert found.tensors == expected.tensors and found.header is not None
    assert expected.header is not None and found.header.recipe == expected.header.recipe
    assert [row.seconds for row in found.header.rows] == seconds
    assert [row.made_by for row in found.header.rows] == [*range(5)]
    assert [row[:2] for row in found.header.rows] == [row[:2] for row in expected.header.rows]
    assert [row.fingerprint for row in found.header.rows] == ROWS
    third = {name: tensor[2:3] for name, tensor in tensors.items()}
    assert found.header.rows[2].data_sha256 == artifacts.hash_tensors(third)
    loaded = row_reader.load_tensors(found, lambda text: pytest.fail(text))
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("error", [StageError("stopped"), KeyboardInterrupt()])
def test_a_file_that_is_not_finished_is_not_there(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / EMBEDDINGS_FILE
    path.write_bytes(b"before")
    with (
        pytest.raises(type(error)),
        written_in_parts(path, make_recipe(), {}, rows_of(2)) as written,
    ):
        written.lay_out({"": {"a": torch.ones(1, 4)}})
        written.put({"a": torch.ones(1, 4)})
        raise error
    assert path.read_bytes() == b"before"
    assert [each.name for each in tmp_path.iterdir()] == [EMBEDDINGS_FILE]


def test_what_is_not_finite_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / EMBEDDINGS_FILE
    with (
        refusal(NotFiniteError, f"{path} was not written: 1 of 4 values of 'a' are not"),
        written_in_parts(path, make_recipe(), {}, rows_of(1)) as written,
    ):
        written.put({"a": torch.tensor([[1.0, 2.0, float("nan"), 4.0]])})
    assert not path.exists()
