"""All that determines a file's content, compared in words."""

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, field_validator

from common.declared import LATENTS
from common.errors import BadInputFileError, shorten

FORMAT_VERSION: Final = 2  # of recipes, and of the headers and picture records that hold them
TRAJECTORY_SETTING = "save_trajectory"


class Recipe(BaseModel):
    """All that determines a file's content; its hash is the file's fingerprint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[2] = FORMAT_VERSION
    stage: int
    settings: dict[str, dict[str, Any]]  # artifact → what shaped it: this stage's, those before it
    inputs: dict[str, str]  # file name → data_sha256
    weights: dict[str, str]  # component → hash of its weights and config
    versions: dict[str, str]  # package → version

    @field_validator("settings")
    @classmethod
    def _as_read_back(cls, settings: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Tuples become lists, so that a new recipe compares with one from a file."""
        return dict(json.loads(to_json(settings)))

    def fingerprint(self) -> str:
        """sha256 of the recipe as JSON with sorted keys."""
        return hashlib.sha256(to_json(self.model_dump()).encode()).hexdigest()

    def settings_of(self, artifact: str) -> dict[str, Any]:
        """What shaped an artifact; nothing where that is not recorded."""
        return self.settings.get(artifact, {})


def recipe_of_trajectory(latents: Recipe, every: int) -> Recipe:
    """All that determines a trajectory: what determines its latents, and its steps."""
    own = latents.settings_of(LATENTS) | {TRAJECTORY_SETTING: every}
    return latents.model_copy(update={"settings": latents.settings | {LATENTS: own}})


def recipe_of_its_latents(trajectory: Recipe) -> Recipe:
    """The recipe of the latents that a trajectory ends in."""
    settings = {
        artifact: {k: v for k, v in own.items() if k != TRAJECTORY_SETTING}
        for artifact, own in trajectory.settings.items()
    }
    return trajectory.model_copy(update={"settings": settings})


def to_json(value: Any) -> str:
    """JSON that is the same for the same value."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)


version = cache(metadata.version)  # of a package that this process has, and so keeps


def package_versions(*packages: str) -> dict[str, str]:
    """Versions of the packages whose arithmetic a stage's result depends on."""
    return {package: version(package) for package in packages}


def age_of_format(found: Any) -> str | None:
    """Whether a `format_version` is "an older" or "a newer" one; None for the present one."""
    if not isinstance(found, int) or found == FORMAT_VERSION:
        return None
    return "a newer" if found > FORMAT_VERSION else "an older"


def refuse_other_format(path: Path, found: Any, mend: str) -> None:
    """Raise `BadInputFileError` where another version of this program made a file.

    Args:
        found: the `format_version` that the file names.
        mend: the end of the sentence.
    """
    age = age_of_format(found)
    if age is not None:
        raise BadInputFileError(f"{path} was made by {age} version of this program; {mend}")


# --- differences in words ------------------------------------------------------------------------


def difference(made: Recipe, expected: Recipe) -> str | None:
    """The differences between two recipes in words, such as "seed 42 → 43"; None where equal."""
    if made.fingerprint() == expected.fingerprint():
        return None
    words = _settings_differences(made.settings, expected.settings)
    words += [f"{key} changed" for key, _ in _differing(made.inputs, expected.inputs)]
    words += [f"weights of {key} changed" for key, _ in _differing(made.weights, expected.weights)]
    words += fact_differences(made.versions, expected.versions)
    return ", ".join(words) or "made by another version of this program"


def names_of_differences(made: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """The keys whose values differ."""
    return [key for key, _ in _differing(made, expected)]


def fact_differences(made: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """The differences between plain values by name, such as "batch_size 1 → 2"."""
    return [f"{key} {' → '.join(pair)}" for key, pair in _differing(made, expected)]


def _settings_differences(
    made: Mapping[str, Mapping[str, Any]], expected: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Those of settings by name, with the artifact's before it where the name is in several."""
    found = [
        (name, artifact, pair)
        for artifact in sorted(made.keys() | expected.keys())
        for name, pair in _differing(made.get(artifact, {}), expected.get(artifact, {}))
    ]
    names = [name for name, _, _ in found]
    return [
        f"{f'{artifact} ' if names.count(name) > 1 else ''}{name} {' → '.join(pair)}"
        for name, artifact, pair in sorted(found)
    ]


def _differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, tuple[str, str]]]:
    """The keys whose values differ, in order, each with its two values in brief."""
    return [
        (key, _brief_pair(old.get(key), new.get(key)))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def _brief_pair(old: Any, new: Any) -> tuple[str, str]:
    """Two values in some forty characters each, those where they begin to differ."""
    texts = [value if isinstance(value, str) else to_json(value) for value in (old, new)]
    same = next((k for k, pair in enumerate(zip(*texts, strict=False)) if len({*pair}) > 1), 0)
    skipped = max(0, same - 15) if max(map(len, texts)) > 40 else 0
    cut = [shorten(f"…{text[skipped:]}" if skipped else text, 40) for text in texts]
    return cut[0], cut[1]
