"""Rows of a file that stages exchange: what determines each, and which an earlier file has.

A row's recipe is that of the file which a run of this row alone writes: whatever stands beside it,
and in whatever place, its fingerprint is the same.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

from common.declared import EMBEDDINGS, IMAGE_LATENTS, LATENTS
from common.errors import BadInputFileError
from common.files import artifacts
from common.files.artifacts import Artifact
from common.files.kept_progress import Making
from common.files.recipe import Recipe, names_of_differences
from common.files.row_places import RowPlace, endings_of, row_places
from common.files.tensor_rows import known_names

# Lists in a recipe with an item for each prompt, or one for all, and for each image; and what an
# item of each is called.
OF_PROMPTS = {
    EMBEDDINGS: {
        "prompts": "prompt",
        "prompts_2": "prompt_2",
        "negative_prompts": "negative_prompt",
        "negative_prompts_2": "negative_prompt_2",
    },
    IMAGE_LATENTS: {"pictures": "image", "masks": "mask_image"},
}
OF_IMAGES = {LATENTS: {"seeds": "seed", "init_latents": "init_latents"}}
OWN = "own"  # in a recipe's settings of an artifact: what of them each row has in another way
ALONE = {LATENTS: {"num_images_per_prompt": 1}}  # what else a run of one image has


def row_recipe(
    whole: Recipe, prompt: int, image: int | None = None, inputs: Mapping[str, str] | None = None
) -> Recipe:
    """The recipe of a run of one row alone.

    Args:
        prompt: the row's, of the run's prompts.
        image: the row's, of the run's images; None where rows are prompts.
        inputs: file → sha256 of the row that this one is made from.
    """
    settings = {artifact: without_own(own) for artifact, own in whole.settings.items()}
    for artifact, of_all in whole.settings.items():
        if OWN in of_all:
            place = prompt if artifact in OF_PROMPTS else image
            settings[artifact] |= {} if place is None else of_all[OWN][place]
    for lists, place in ((OF_PROMPTS, prompt), (OF_IMAGES, image)):
        for artifact in lists.keys() & settings.keys():
            own = settings[artifact]
            settings[artifact] = own | {
                name: [own[name][place]]
                for name in lists[artifact].keys() & own.keys()
                if place is not None and len(own[name]) > 1
            }
    for artifact in ALONE.keys() & settings.keys():
        settings[artifact] = settings[artifact] | ALONE[artifact]
    return whole.model_copy(update={"settings": settings, "inputs": dict(inputs or {})})


def without_own(settings: Mapping[str, Any]) -> dict[str, Any]:
    """An artifact's settings without those that single rows have."""
    return {name: value for name, value in settings.items() if name != OWN}


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows that a stage is to write, and those of them that an earlier file has."""

    recipes: list[Recipe]
    fingerprints: list[str]
    earlier: Artifact | None = None
    places: dict[int, int] = field(default_factory=dict)  # row → its place in the earlier file

    @classmethod
    def all_missing(cls, recipes: Sequence[Recipe]) -> Self:
        """Rows of which an earlier file has none."""
        return cls(recipes=[*recipes], fingerprints=[recipe.fingerprint() for recipe in recipes])

    @property
    def missing(self) -> list[int]:
        """Those that are to be made."""
        return [row for row in range(len(self.recipes)) if row not in self.places]

    def without(self, chosen: Collection[int]) -> Self:
        """The same, of which some rows are to be made whatever the earlier file has."""
        places = {row: place for row, place in self.places.items() if row not in chosen}
        return replace(self, places=places)

    def making(self, row: int) -> Making:
        """How a row of the earlier file was made."""
        assert self.earlier is not None and self.earlier.header is not None
        header, place = self.earlier.header, self.places[row]
        return Making(header.rows[place].seconds, header.made_by(place))

    @cached_property
    def endings(self) -> list[str]:
        """Of the rows' tensors in the file to write."""
        return endings_of(self.recipes) or [""] * len(self.fingerprints)

    @cached_property
    def earlier_places(self) -> list[RowPlace]:
        """Of all rows in the earlier file."""
        return [] if self.earlier is None else row_places(self.earlier)

    def changes(self, asked: int = 0) -> "Changes":
        """What is to be made, and why.

        Args:
            asked: further rows that are made anew.
        """
        made = [] if self.earlier is None else _recipes_in(self.earlier)
        kept = {*self.places.values()}
        gone = [told_of(recipe) for place, recipe in enumerate(made) if place not in kept]
        missing = [told_of(self.recipes[row]) for row in self.missing]
        return Changes.of(len(self.recipes), missing, gone, asked)


def row_hashes(artifact: Artifact) -> list[str]:
    """sha256 of each row of a file, as the file of a run of this row alone has it."""
    if artifact.header is not None and artifact.header.rows:
        return [row.data_sha256 for row in artifact.header.rows]
    from safetensors import safe_open

    with safe_open(artifact.path, "pt") as file:
        names = known_names(artifact.path.name, artifact.tensors)
        slices = {name: file.get_slice(name) for name in names}
        count = len(row_places(artifact))
        rows = ({name: part[k : k + 1] for name, part in slices.items()} for k in range(count))
        return [artifacts.hash_tensors(row) for row in rows]


def find_rows(path: Path, recipes: Sequence[Recipe], *, verify: bool = True) -> Rows:
    """The rows to write to a file, and those that it has already, wherever they stand in it.

    Args:
        recipes: of the rows.
        verify: as `artifacts.inspect`.
    """
    rows = Rows.all_missing(recipes)
    try:
        earlier = artifacts.inspect(path, verify=verify)
    except BadInputFileError:
        return rows
    if earlier.header is None:
        return rows
    there = {row.fingerprint: place for place, row in enumerate(earlier.header.rows)}
    places = {row: there[each] for row, each in enumerate(rows.fingerprints) if each in there}
    return replace(rows, earlier=earlier, places=places)


def _recipes_in(artifact: Artifact) -> list[Recipe]:
    """The recipes of a file's rows, but for what these were made from."""
    assert artifact.header is not None
    whole, count = artifact.header.recipe, len(artifact.header.rows)
    if LATENTS not in whole.settings:
        return [row_recipe(whole, row) for row in range(count)]
    return [row_recipe(whole, p, row) for row, p in enumerate(prompts_of_images(whole, count))]


def prompts_of_images(whole: Recipe, images: int) -> list[int]:
    """The prompt of each image of a run, as a recipe of its latents or pictures tells them."""
    of_each = whole.settings_of(LATENTS).get("num_images_per_prompt", 1)
    if isinstance(of_each, int):
        return [image // of_each for image in range(images)]
    return [prompt for prompt, own in enumerate(of_each) for _ in range(own)]


ITEM_NAMES = {
    name: item
    for lists in (OF_PROMPTS, OF_IMAGES)
    for items in lists.values()
    for name, item in items.items()
}


class Told(NamedTuple):
    """What is told of a row, to say in what it is another one than before."""

    settings: Mapping[str, Any]  # as one image has them
    weights: Mapping[str, str]
    versions: Mapping[str, str]


def told_of(row: Recipe) -> Told:
    """What a row's recipe tells."""
    settings = {
        ITEM_NAMES.get(name, name): value[0] if name in ITEM_NAMES and value else value
        for own in row.settings.values()
        for name, value in own.items()
    }
    return Told(settings, row.weights, row.versions)


@dataclass(frozen=True)
class Changes:
    """What of some rows is to be made, and why."""

    count: int  # of all rows
    new: int
    changed: int
    names: list[str]  # of what has changed
    asked: int = 0  # of those that are there and as they should be

    @classmethod
    def of(cls, count: int, missing: Sequence[Told], gone: Iterable[Told], asked: int = 0) -> Self:
        """Those of rows that are missing.

        Args:
            gone: rows that were there, and are not among those that are wanted.
            asked: rows that are made anew though nothing is missing.
        """
        others, new = _ByLikeness(gone), 0
        changed: dict[str, None] = {}
        for row in missing:
            before = others.take_like(row)
            if before is None:
                new += 1
                continue
            names = names_of_differences(before.settings, row.settings)
            weights = names_of_differences(before.weights, row.weights)
            names += [f"weights of {name}" for name in weights]
            names += names_of_differences(before.versions, row.versions)
            changed |= dict.fromkeys(names or ["what it is made from"])
        return cls(count, new, len(missing) - new, [*changed], asked)

    def in_words(self) -> str:
        """As a stage says it."""
        said = f"{self.new + self.changed + self.asked} of {self.count} to make"
        why = [f"{self.new} new"] if self.new else []
        if self.changed:
            why.append(f"{self.changed} changed ({', '.join(self.names)})")
        why += [f"{self.asked} asked for"] if self.asked else []
        return f"{said}: {', '.join(why)}" if why else f"{said}; others stand elsewhere now"


class _ByLikeness:
    """Rows by what they are known by: prompt and seed, or one of them."""

    def __init__(self, rows: Iterable[Told]) -> None:
        self._rows = [*rows]
        self._found: list[dict[Any, list[int]]] = [{}, {}, {}]
        self._taken: set[int] = set()
        for number, row in enumerate(self._rows):
            for known, key in zip(self._found, _known_by(row), strict=True):
                if key is not None:
                    known.setdefault(key, []).append(number)

    def take_like(self, row: Told) -> Told | None:
        """The first that is most like another one, and has not been taken."""
        for known, key in zip(self._found, _known_by(row), strict=True):
            for number in known.get(key, ()):
                if number not in self._taken:
                    self._taken.add(number)
                    return self._rows[number]
        return None


def _known_by(row: Told) -> tuple[Any, Any, Any]:
    prompt, seed = row.settings.get("prompt"), row.settings.get("seed")
    return (prompt, seed), prompt, seed
