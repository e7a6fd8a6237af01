"""What requests may name: checkpoints, LoRAs and textual inversions in folders of the server's."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from common.errors import BadSettingError, UnfitEnvironmentError, listed, shorten
from common.models.model_settings import ModelSettings
from common.models.textual_inversion import word_pattern
from common.runs.generation import RunSettings, read_run_settings
from common.text_files import parse_json

SUFFIX, INDEX_FILE = ".safetensors", "model_index.json"
# Flags take FILE:SCALE and FILE:WORD, and lists of names have commas.
NAME = re.compile(r"[^.:,<>][^:,<>]*")
MOST_NAMED = 60  # characters of what is refused
MOST = 16  # LoRAs, or textual inversions, of a request
MOST_SCALE = 100.0


def _of_forms(value: Any) -> Any:
    """Forms have texts alone: JSON."""
    try:
        return parse_json(value) if isinstance(value, str) else value
    except ValueError:
        return value  # which is refused


# Of requests. LoRAs by their names → how much of each is added.
Loras = Annotated[dict[str, float], Field(max_length=MOST), BeforeValidator(_of_forms)]
Embeddings = Annotated[list[str], Field(max_length=MOST), BeforeValidator(_of_forms)]


@dataclass(frozen=True, kw_only=True)
class Catalog:
    """Names for what lies in folders; they are read anew each time, so that what is new is there.

    A checkpoint is a folder of diffusers', anything else a file, which is named without
    `.safetensors`. Names have no `:`, `,`, `<`, `>` and no dot at their begin; other files are not
    there. Folders that cannot be read are an `UnfitEnvironmentError`.
    """

    own_model: str  # the name of the one that is served where none is named
    models_dir: Path | None = None
    loras_dir: Path | None = None
    embeddings_dir: Path | None = None

    def check(self, flags: Mapping[str, Any]) -> None:
        """Raise `BadSettingError` for a folder that is not there, or what does not go with one.

        Args:
            flags: of every run, as `run_all.sh` takes them.
        """
        for name in ("models_dir", "loras_dir", "embeddings_dir"):
            folder = getattr(self, name)
            if folder is not None and not folder.is_dir():
                raise BadSettingError(f"--{name} {folder} is no folder")
        of_file = read_run_settings(flags.get("config"), {})
        for name in ModelSettings.model_fields.keys() - {"model_id"}:
            default = RunSettings.model_fields[name].default
            if self.models_dir and (name in flags or getattr(of_file, name) != default):
                raise BadSettingError(
                    f"--{name} is of one checkpoint, and --models_dir lets requests name others: "
                    "leave one of both out"
                )
        for kind, flag in (("loras", "lora"), ("embeddings", "embedding")):
            if getattr(self, f"{kind}_dir") and getattr(of_file, kind):
                raise BadSettingError(
                    f"--config has {kind}, which those of --{kind}_dir would replace: give them by "
                    f"--{flag}"
                )

    def models(self) -> list[str]:
        """The checkpoints, the server's own one first."""
        others = (name for name in self._there("models") if name != self.own_model)
        return [self.own_model, *others]

    def loras(self) -> list[str]:
        """The LoRAs."""
        return [*self._there("loras")]

    def embeddings(self) -> list[str]:
        """The textual inversions, each by the word that stands for it."""
        return [*self._there("embeddings")]

    def flags(
        self, model: str | None, loras: Mapping[str, float], embeddings: Sequence[str]
    ) -> dict[str, Any]:
        """What a request names, as `run_all.sh` takes it.

        Args:
            model: None: the server's own.
            loras: name → scale.

        Raises:
            BadSettingError: it is not here, too much, or the scale is out of bounds.
        """
        found: dict[str, Any] = {}
        if model not in (None, self.own_model):
            found["model_id"] = str(self._find("models", str(model)))
        for kind, named in (("LoRAs", loras), ("textual inversions", embeddings)):
            if len(named) > MOST:
                raise BadSettingError(f"{len(named)} {kind} are more than {MOST}: name fewer")
        for name, scale in loras.items():
            path = self._find("loras", name)
            if not (math.isfinite(scale) and abs(scale) <= MOST_SCALE):
                said = f"give a scale from {-MOST_SCALE:g} to {MOST_SCALE:g}"
                raise BadSettingError(f"lora {shorten(name, MOST_NAMED)}: {said}")
            found.setdefault("lora", []).append(f"{path}:{scale}")
        for name in dict.fromkeys(embeddings):
            # By its name here, whatever word its file has.
            path = self._find("embeddings", name)
            found.setdefault("embedding", []).append(f"{path}:{name}")
        return found

    def embeddings_in(self, prompts: Sequence[str], known: Sequence[str]) -> list[str]:
        """The textual inversions whose names stand in prompts, as web UIs load them.

        Args:
            known: words of the server's own ones.
        """
        own = {word.lower() for word in known}
        return [
            name
            for name in self.embeddings()
            if name.lower() not in own
            and any(re.search(word_pattern(name), text, re.I) for text in prompts)
        ]

    def _there(self, kind: str) -> dict[str, Path]:
        """Name → path, in their order."""
        folder: Path | None = getattr(self, f"{kind}_dir")
        if folder is None:
            return {}
        try:
            paths = sorted(folder.resolve().iterdir())
        except OSError as error:
            said = error.strerror
            raise UnfitEnvironmentError(f"--{kind}_dir cannot be read ({said})") from None
        found = {
            path.name if kind == "models" else path.stem: path
            for path in paths
            if (_is_checkpoint(path) if kind == "models" else path.suffix == SUFFIX)
        }
        return {name: path for name, path in found.items() if _is_name(name)}

    def _find(self, kind: str, name: str) -> Path:
        there = self._there(kind)
        if name not in there:
            said = shorten(name, MOST_NAMED)
            told = self.models() if kind == "models" else [*there]
            raise BadSettingError(
                f"{kind.removesuffix('s')} {said!r} is not here: there is {listed(told) or 'none'}"
            )
        return there[name]


def _is_checkpoint(path: Path) -> bool:
    try:
        return (path / INDEX_FILE).is_file()
    except OSError:  # it is not for this user
        return False


def _is_name(name: str) -> bool:
    return name.isprintable() and NAME.fullmatch(name) is not None
