"""Where rows of several sizes are in a file, and that what is written so is read back."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from common.declared import LATENTS
from common.files import artifacts
from common.files.kept_progress import Making
from common.files.made_rows import MadeRows
from common.files.recipe import Recipe
from common.files.row_places import (
    endings_of,
    layouts_by_ending,
    places_of,
    row_places,
    size_in,
)
from common.files.row_reader import RowReader
from common.files.rows import find_rows, row_hashes
from common.files.stage_table import LATENTS_FILE

SIZES = [(64, 32), (32, 64), (64, 32), (32, 32), (32, 64)]  # height, width


def recipes(*rows: int) -> list[Recipe]:
    return [
        Recipe(
            stage=2,
            settings={LATENTS: {"seeds": [row], "height": SIZES[row][0], "width": SIZES[row][1]}},
            inputs={},
            weights={},
            versions={},
        )
        for row in rows
    ]


def latents(row: int) -> torch.Tensor:
    height, width = SIZES[row]
    return torch.full((1, 4, height // 8, width // 8), float(row))


def test_names_end_in_the_size_where_there_are_several() -> None:
    endings = endings_of(recipes(*range(5)))
    assert endings == ["_32x64", "_64x32", "_32x64", "_32x32", "_64x32"]
    assert endings_of(recipes(0, 2)) == ["", ""] and endings_of([]) == []
    assert size_in("_32x64") == (64, 32)
    assert [place.row for place in places_of(endings)] == [0, 0, 1, 0, 1]


def test_rows_of_several_sizes_are_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / LATENTS_FILE
    wanted = recipes(*range(5))
    made = MadeRows(path, find_rows(path, wanted))
    for row in range(5):
        made.put([row], {"latents": latents(row)}, Making(1.0, {}), keep=False)
    shapes = made.write(["latents"], wanted[0], {})
    assert shapes["latents_32x64"] == [2, 4, 8, 4] and shapes["latents_32x32"] == [1, 4, 4, 4]
    whole = load_file(path)
    assert whole["latents_64x32"].equal(torch.cat([latents(1), latents(4)]))
    found = artifacts.inspect(path)  # whose checksum is that of its bytes
    assert {own["latents"].shape[0] for own in layouts_by_ending(found).values()} == {1, 2}
    assert [place.ending for place in row_places(found)] == endings_of(wanted)
    reader = RowReader(found, lambda text: None)
    assert reader.sizes == [[0, 2], [1, 4], [3]]
    for rows in reader.sizes:
        expected = torch.cat([latents(row) for row in rows])
        assert reader.read(rows)["latents"].equal(expected)
    # A row is known by what a run of it alone writes.
    alone = [artifacts.hash_tensors({"latents": latents(row)}) for row in range(5)]
    assert row_hashes(found) == alone


def test_rows_are_taken_into_a_file_of_other_sizes(tmp_path: Path) -> None:
    """Of one size they have no ending; of several, another place in their tensor."""
    path = tmp_path / LATENTS_FILE
    first = MadeRows(path, find_rows(path, recipes(*range(5))))
    for row in range(5):
        first.put([row], {"latents": latents(row)}, Making(1.0, {}), keep=False)
    first.write(["latents"], recipes(0)[0], {})
    for order in ([2, 0], [4, 3, 1]):
        picked = find_rows(path, recipes(*order))
        assert not picked.missing
        other = tmp_path / "other" / LATENTS_FILE
        MadeRows(other, picked).write(["latents"], recipes(0)[0], {})
        reader = RowReader(artifacts.inspect(other), lambda text: None)
        for place, row in enumerate(order):
            assert reader.read([place])["latents"].equal(latents(row))
        assert ("latents" in artifacts.inspect(other).tensors) == (order == [2, 0])
