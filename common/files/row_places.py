"""Where the rows of a file are: rows of one size stand in one tensor, those of another in another.

A file whose rows are of one size has a tensor `latents`; one of several sizes `latents_96x64` and
`latents_64x64`, whose names end in width and height. Its header says the ending of each row, and
rows of one ending stand in their order.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from common.declared import LATENTS
from common.files.artifacts import Artifact, TensorLayout
from common.files.recipe import Recipe
from common.files.tensor_rows import known_names


class RowPlace(NamedTuple):
    """Where a row is in a file."""

    ending: str  # of its tensors' names
    row: int  # of these tensors


def endings_of(recipes: Sequence[Recipe]) -> list[str]:
    """The ending of each of a file's rows, by the recipes of runs of these alone."""
    sizes = [
        (own.get("width"), own.get("height"))
        for own in (recipe.settings_of(LATENTS) for recipe in recipes)
    ]
    if len({*sizes}) <= 1:
        return [""] * len(sizes)
    return [f"_{width}x{height}" for width, height in sizes]


def size_in(ending: str) -> tuple[int, int]:
    """The height and width that an ending names."""
    width, height = ending.removeprefix("_").split("x")
    return int(height), int(width)


def places_of(endings: Iterable[str]) -> list[RowPlace]:
    """Where rows are, by the ending of each."""
    before: Counter[str] = Counter()
    found = []
    for ending in endings:
        found.append(RowPlace(ending, before[ending]))
        before[ending] += 1
    return found


def row_places(artifact: Artifact) -> list[RowPlace]:
    """Where each row of a file is."""
    if artifact.header is not None and artifact.header.rows:
        return places_of(row.ending for row in artifact.header.rows)
    names = known_names(artifact.path.name, artifact.tensors)
    count = min(artifact.tensors[name].shape[0] for name in names)
    return [RowPlace("", row) for row in range(count)]


def layouts_by_ending(artifact: Artifact) -> dict[str, dict[str, TensorLayout]]:
    """A file's tensors by the endings of its rows, each under its name without it."""
    rows = [] if artifact.header is None else artifact.header.rows
    return {
        ending: {
            name.removesuffix(ending): layout
            for name, layout in artifact.tensors.items()
            if name.endswith(ending)
        }
        for ending in dict.fromkeys(row.ending for row in rows) or [""]
    }
