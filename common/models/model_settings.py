"""Which checkpoint is read, and what replaces or is added to its parts."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import create_model, model_validator

from common.declared import (
    EMBEDDINGS,
    IMAGE_LATENTS,
    LATENTS,
    MODEL,
    PICTURES,
    Place,
    Settings,
    Word,
    setting,
)
from common.models.component_table import Component, replaceable

PROJECT_DIR = Path(__file__).resolve().parents[2]
ALL = (EMBEDDINGS, IMAGE_LATENTS, LATENTS, PICTURES)  # artifacts


class TokenFile(Settings):
    """A textual inversion: a safetensors file and the word that stands for it in prompts."""

    file: Place
    # None: the one in the file, or its name.
    token: Word | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        """`FILE` or `FILE:TOKEN`."""
        if not isinstance(value, str):
            return value
        file, colon, token = value.rpartition(":")
        if not colon or "/" in token or token.lower().endswith(".safetensors"):
            return {"file": value}
        return {"file": file, "token": token}


class LoraFile(Settings):
    """A LoRA: a safetensors file and how much of it is added."""

    file: Place
    scale: float = 1.0

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        """`FILE` or `FILE:SCALE`."""
        if not isinstance(value, str):
            return value
        file, colon, scale = value.rpartition(":")
        if colon and re.fullmatch(r"-?[\d.]+(e-?\d+)?", scale):
            return {"file": file, "scale": scale}
        return {"file": value}


class _Checkpoint(Settings):
    model_id: Place = setting(
        "models/demo",
        "Folder, hub id or one file.",
        metavar="ID",
        group=MODEL,
        shapes=ALL,
        recorded=False,
        web_ui="Model",
    )
    revision: Place | None = setting(
        None,
        "Branch, tag or commit of a hub id.",
        metavar="NAME",
        group=MODEL,
        shapes=ALL,
        recorded=False,
        shown="",
    )
    variant: str | None = setting(
        None,
        "Of the weights files, as fp16.",
        metavar="NAME",
        group=MODEL,
        shapes=ALL,
        recorded=False,
        shown="",
        pattern=r"^[\w-]+$",
    )
    single_file_config: Place | None = setting(
        None,
        "Configs of a one-file model_id.",
        metavar="ID",
        group=MODEL,
        shapes=ALL,
        recorded=False,
        shown="",
    )


def _replacement(row: Component) -> tuple[Any, Any]:
    """The type and the declaration of the setting that replaces a component."""
    declared = setting(
        None,
        f"Another {row.title}: folder, hub id, file.",
        metavar="ID",
        group=MODEL,
        shapes=row.loaded_for,
        recorded=False,
        shown="",
    )
    return Place | None, declared


if TYPE_CHECKING:  # a type checker cannot follow the table

    class _Replacements(Settings): ...

else:
    _Replacements = create_model(
        "_Replacements", __base__=Settings, **{row.name: _replacement(row) for row in replaceable()}
    )


class ModelSettings(_Replacements, _Checkpoint):
    """Which checkpoint is read: a folder, a hub id or one file, and what replaces its parts.

    Recipes hold the content of what is read, not its name.
    """

    def replacements(self) -> dict[str, str]:
        """Component → the place that it comes from, where that is not the checkpoint."""
        values = {row.name: getattr(self, row.name) for row in replaceable()}
        return {name: value for name, value in values.items() if value is not None}

    def model_settings(self) -> dict[str, str]:
        """Which checkpoint is read, by those of these settings that are given."""
        values = {name: getattr(self, name) for name in ModelSettings.model_fields}
        return {name: value for name, value in values.items() if value is not None}


class LoraSettings(Settings):
    """What is added to the weights of the UNet and the text encoders."""

    loras: tuple[LoraFile, ...] = setting(
        (),
        "A LoRA; again for more; or FILE:SCALE.",
        metavar="FILE",
        group=MODEL,
        shapes=(EMBEDDINGS, LATENTS),
        of_prompts=True,
        recorded=False,
        many=True,
        flag="lora",
        shown="",
    )
