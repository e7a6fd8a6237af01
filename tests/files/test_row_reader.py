"""Rows are read one by one as the whole file is."""

from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import BadInputFileError, NotFiniteError
from common.files import artifacts, row_reader
from common.files.row_reader import RowReader
from common.files.rows import row_hashes
from common.files.stage_table import LATENTS_FILE
from tests.refusals import refusal


def save(path: Path, **tensors: torch.Tensor) -> artifacts.Artifact:
    artifacts.save_whole(path, tensors, {})
    return artifacts.inspect(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_those_of_the_whole(tmp_path: Path, dtype: torch.dtype) -> None:
    """Of a file of any name; in one of a stage's, other tensors than that reads are left out."""
    tensors = {"latents": torch.randn(200, 2, 3).to(dtype), "pooled": torch.randn(200, 5)}
    found, said = save(tmp_path / "any.safetensors", **tensors), list[str]()
    rows = RowReader(found, said.append)
    assert rows.sizes == [[*range(200)]] and "has no header of ours" in said[0]
    for places in ([7], [199, 0, 0, 64]):
        read = rows.read(places)
        assert read.keys() == tensors.keys()
        assert all(read[name].equal(tensor[places]) for name, tensor in tensors.items())
        one = rows.tensors()["pooled"][np.array(places)]
        assert one.equal(tensors["pooled"][places])
    beside = {**tensors, "steps": torch.zeros(1), "scale": torch.tensor(1.0)}
    rows = RowReader(save(tmp_path / LATENTS_FILE, **beside), said.append)
    assert rows.sizes == [[*range(200)]] and rows.read([3]).keys() == {"latents"}
    assert len(row_hashes(artifacts.inspect(tmp_path / LATENTS_FILE))) == 200
    whole = row_reader.load_tensors(found, said.append)
    assert all(whole[name].equal(tensor) for name, tensor in tensors.items())


def test_what_is_not_finite_or_gone_is_refused(tmp_path: Path) -> None:
    latents = torch.ones(130, 2)
    latents[129, 1] = torch.inf
    found = save(tmp_path / LATENTS_FILE, latents=latents)
    with refusal(NotFiniteError, "cannot be used: 1 of 4 values of 'latents' are not finite"):
        RowReader(found, list().append)
    found.path.write_bytes(b"")
    with refusal(BadInputFileError, f"{found.path} is damaged"):
        row_reader.read_rows(found.path, [0])
