"""The commands that make one image of a run alone again."""

import json
import shlex
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from common.compute.options import MadeBy
from common.conditions.prompt_settings import PromptSettings
from common.declared import Declared, declarations
from common.files.recipe import to_json
from common.files.stage_table import FIRST, STAGES
from common.runs.generation import GenerationConfig, RunSettings
from common.runs.in_turn import arguments_for
from common.runs.parts import settled_for

# Flag → its value, its values where it may be given again, or True for a switch.
Flags = dict[str, Any]
OF_PROMPTS = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2", "image", "mask_image")
# What says how many pictures there are, what they are called and what is made of all of them.
OF_SEVERAL = (
    *("num_images_per_prompt", "same_seed", "seed_offset", "prompts_file", "prompt_syntax"),
    *("wildcards", "name_template", "index", "grid_images"),
)


class Redo:
    """The flags of runs of one image alone, whose settings are those that a run settled."""

    def __init__(self, config: GenerationConfig, settled: Mapping[str, Any]) -> None:
        """
        Args:
            config: the run's, with what flags overrode.
            settled: settings that `auto` has come to since.
        """
        self._config, self._settled = config, settled
        self._known: dict[str, dict[str, Any]] = {}

    def _shared(self, prompt: PromptSettings) -> dict[str, Any]:
        """All settings but the prompts', as the images of one have them."""
        key = to_json(prompt.settings)
        if key not in self._known:
            own = settled_for(self._config, prompt)
            self._known[key] = {**own.model_dump(exclude={"prompts"}), **self._settled}
        return self._known[key]

    @cached_property
    def _seeds(self) -> list[int]:
        return self._config.image_seeds()

    @cached_property
    def _prompt_of(self) -> list[int]:
        return self._config.prompt_of_images()

    def flags(self, image: int) -> Flags:
        """Those of an image, by its index."""
        prompt = self._config.prompts[self._prompt_of[image]]
        own = {name: getattr(prompt, name) for name in OF_PROMPTS} | {"seed": self._seeds[image]}
        settings, found = {**self._shared(prompt), **own}, Flags()
        for name, declared in declarations(RunSettings):
            default = RunSettings.model_fields[name].default
            if name in OF_SEVERAL or name not in settings or settings[name] == default:
                continue
            found |= _as_flags(declared.flag or name, declared, settings[name])
        return found


def _as_flags(name: str, declared: Declared, value: Any) -> Flags:
    """A setting's value as its flag takes it; nothing where no flag gives it."""
    if value is None:
        return {} if declared.none_flag is None else {declared.none_flag[0]: True}
    if value is False or value == ():
        return {}
    if value is True:
        return {name: True}
    if isinstance(value, dict):
        return {name: [f"{key}={json.dumps(each)}" for key, each in value.items()]}
    if declared.many:
        return {name: [_text(each) for each in ([value] if isinstance(value, str) else value)]}
    return {name: ",".join(map(str, value)) if isinstance(value, tuple) else str(value)}


def _text(value: Any) -> str:
    """An item of a list as a flag takes it."""
    if isinstance(value, str):
        return value
    parts = [str(part) for part in value.values() if part is not None]
    return ":".join(parts)


def commands(flags: Flags, made_by: Mapping[str, MadeBy], output_dir: Path) -> list[str]:
    """The command of each stage.

    Args:
        flags: of the image, as `Redo` gives them.
        made_by: stage's number → the options that its bits depend on.
        output_dir: where the image is to be.
    """
    lines = []
    for stage in STAGES:
        if stage.of_pictures and "image" not in flags:
            continue
        given = {"output_dir": str(output_dir), **made_by.get(str(stage.number), {})}
        given |= flags if stage is FIRST else {}
        arguments, _ = arguments_for(stage, given, first=True)
        lines.append(f"{stage.command} {shlex.join(arguments)}")
    return lines
