"""What requests may name: checkpoints, LoRAs and textual inversions in folders of the server's."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from common.errors import BadSettingError, shorten

SUFFIX, INDEX_FILE = ".safetensors", "model_index.json"
MOST_NAMED = 60  # characters of what is refused
MOST_TOLD = 20  # names
MOST_SCALE = 100.0


def _of_forms(value: Any) -> Any:
    """Forms have texts alone: JSON."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


# Of requests. LoRAs by their names → how much of each is added.
Loras = Annotated[dict[str, float], Field(max_length=16), BeforeValidator(_of_forms)]
Embeddings = Annotated[list[str], Field(max_length=64), BeforeValidator(_of_forms)]


@dataclass(frozen=True, kw_only=True)
class Catalog:
    """Names for what lies in folders; they are read anew each time, so that what is new is there.

    A checkpoint is a folder of diffusers' or one file, anything else one file; their names are the
    files' without `.safetensors`.
    """

    own_model: str  # the name of the one that is served where none is named
    models_dir: Path | None = None
    loras_dir: Path | None = None
    embeddings_dir: Path | None = None

    def check(self) -> None:
        """Raise `BadSettingError` for a folder that is not there."""
        for kind in ("models", "loras", "embeddings"):
            folder = getattr(self, f"{kind}_dir")
            if folder is not None and not folder.is_dir():
                raise BadSettingError(f"--{kind}_dir {folder} is no folder")

    def models(self) -> list[str]:
        """The checkpoints, the server's own one first."""
        there = _files(self.models_dir, folders=True)
        return [self.own_model, *(name for name in there if name != self.own_model)]

    def loras(self) -> list[str]:
        """The LoRAs."""
        return [*_files(self.loras_dir)]

    def embeddings(self) -> list[str]:
        """The textual inversions, each with the word that stands for it."""
        return [*_files(self.embeddings_dir)]

    def flags(
        self, model: str | None, loras: Mapping[str, float], embeddings: Sequence[str]
    ) -> dict[str, Any]:
        """What a request names, as `run_all.sh` takes it.

        Args:
            model: None: the server's own.
            loras: name → scale.

        Raises:
            BadSettingError: it is not here, or the scale is out of bounds.
        """
        found: dict[str, Any] = {}
        if model not in (None, self.own_model):
            there = _files(self.models_dir, folders=True)
            found["model_id"] = str(_find("model", str(model), there, self.models()))
        files = _files(self.loras_dir)
        for name, scale in loras.items():
            path = _find("lora", name, files, [*files])
            if not (math.isfinite(scale) and abs(scale) <= MOST_SCALE):
                said = shorten(name, MOST_NAMED)
                raise BadSettingError(f"lora {said}: give a scale of at most {MOST_SCALE:g}")
            found.setdefault("lora", []).append(f"{path}:{scale}")
        files = _files(self.embeddings_dir)
        for name in dict.fromkeys(embeddings):
            # By its name here, whatever word its file has.
            path = _find("embedding", name, files, [*files])
            found.setdefault("embedding", []).append(f"{path}:{name}")
        return found

    def embeddings_in(self, *prompts: str) -> list[str]:
        """The textual inversions whose names stand in prompts, as web UIs load them."""
        return [
            name
            for name in self.embeddings()
            if any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text, re.I) for text in prompts)
        ]


def _files(folder: Path | None, *, folders: bool = False) -> dict[str, Path]:
    """Name → file of a folder, and checkpoints that are folders."""
    if folder is None:
        return {}
    return dict(_named(folder, folders))


def _named(folder: Path, folders: bool) -> Iterator[tuple[str, Path]]:
    try:
        paths = sorted(folder.iterdir())
    except OSError:
        raise BadSettingError("the folder of what is asked for is not there any more") from None
    for path in paths:
        if path.suffix == SUFFIX and path.is_file():
            is_twice = folders and (path.with_suffix("") / INDEX_FILE).is_file()
            yield path.name if is_twice else path.stem, path.resolve()
        elif folders and (path / INDEX_FILE).is_file():
            yield path.name, path.resolve()


def _find(kind: str, name: str, there: Mapping[str, Path], told: Sequence[str]) -> Path:
    path = there.get(name)
    if path is None:
        names = ", ".join(told[:MOST_TOLD]) or "none"
        raise BadSettingError(
            f"{kind} {shorten(name, MOST_NAMED)!r} is not here: there is {names}"
            + (f" and {len(told) - MOST_TOLD} more" if len(told) > MOST_TOLD else "")
        )
    return path
