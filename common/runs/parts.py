"""The images of a run that have the same settings, where prompts have some of their own."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from common.conditions.prompt_settings import PromptSettings
from common.declared import flag_of, validate
from common.errors import BadSettingError, listed
from common.files.recipe import Recipe, to_json
from common.messages import warn
from common.models.model_settings import LoraFile
from common.runs.generation import GenerationConfig, check_size
from common.sampling.sampling_settings import STEP_SETTINGS, merge_settings

# Of a run's first file; later ones hold what that holds and more: seeds, settings of their own.
MOST_PROMPTS_BYTES = 12_000_000
BYTES_OF_A_ROW = 180  # its two hashes, its seconds, its size and what separates them
BYTES_OF_A_LORA = 120  # its hash
BYTES_OF_SOME = 150  # of names and of what goes with a setting: the other ways to give steps


@dataclass(frozen=True, kw_only=True)
class Part:
    """Images with the same settings."""

    config: GenerationConfig  # these; of the prompts the first that has them, or the run's
    images: list[int]


def parts_of(config: GenerationConfig) -> list[Part]:
    """A run's images by their settings, in the order in which these are met.

    Raises:
        BadSettingError: a prompt's own settings do not go together with the run's.
    """
    images: dict[str, list[int]] = {}
    first: dict[str, PromptSettings] = {}
    for image, prompt in enumerate(config.prompt_of_images()):
        own = config.prompts[prompt]
        key = to_json(own.settings)
        images.setdefault(key, []).append(image)
        first.setdefault(key, own)
    return [
        Part(config=settled_for(config, prompt), images=images[key])
        for key, prompt in first.items()
    ]


def settled_for(config: GenerationConfig, prompt: PromptSettings) -> GenerationConfig:
    """A run's settings with those of one of its prompts in their place.

    Raises:
        BadSettingError: they do not go together.
    """
    if not prompt.settings:
        return config
    where = f"the prompt {prompt.prompt[:40]!r}"
    merged = merge_settings(config.model_dump(exclude={"prompts"}), prompt.settings, where)
    alone = prompt.model_copy(update={"settings": {}})
    own = {"prompts": [alone.model_dump()], "seed_offset": 0}  # of seeds the run's are checked
    return validate(GenerationConfig, merged | own, where)


def check_sizes(config: GenerationConfig, parts: Sequence[Part], size_factor: int) -> None:
    """Raise `BadSettingError` where a side of images is no multiple of `size_factor` pixels.

    Args:
        config: the run's.
    """
    for part in parts:
        own = part.config.prompts[0].prompt
        whose = "--" if part.config is config else f"the prompt {own[:40]!r}: "
        check_size(part.config, size_factor, whose)


def loras_of_prompts(config: GenerationConfig) -> list[tuple[LoraFile, ...]]:
    """The LoRAs of each prompt: its own, or the run's."""
    known: dict[str, tuple[LoraFile, ...]] = {}
    found = []
    for prompt in config.prompts:
        own = prompt.settings.get("loras")
        key = to_json(own)
        if key not in known:
            known[key] = config.loras if own is None else settled_for(config, prompt).loras
        found.append(known[key])
    return found


def warn_of_own_settings(config: GenerationConfig, given: Collection[str]) -> None:
    """Say which flags change nothing since all prompts have the setting themselves.

    Args:
        given: the settings that flags gave.
    """
    names = {*given}.intersection(*(_replaced_by(prompt) for prompt in config.prompts))
    if names:
        flags = listed([f"--{flag_of(GenerationConfig, name)}" for name in sorted(names)])
        warn(f"{flags} has no effect: all prompts have settings of their own in its place")


def refuse_long_prompts(recipe: Recipe, config: GenerationConfig) -> None:
    """Raise `BadSettingError` where files could not be read for all the prompts in their headers.

    Args:
        recipe: of the embeddings.
    """
    length = len(json.dumps(to_json(recipe.model_dump()), ensure_ascii=False).encode())
    counts = config.images_of_prompts()
    length += BYTES_OF_A_ROW * sum(counts)
    for prompt, count in zip(config.prompts, counts, strict=True):
        if own := prompt.settings:
            loras = BYTES_OF_A_LORA * len(own.get("loras") or ())
            length += count * (len(to_json(own)) + BYTES_OF_SOME + loras)
    if length > MOST_PROMPTS_BYTES:
        raise BadSettingError(
            f"the prompts and images take {length / 1e6:.0f} MB of each file's header, which holds "
            f"{MOST_PROMPTS_BYTES / 1e6:.0f} MB of them: split them among several runs"
        )


def _replaced_by(prompt: PromptSettings) -> set[str]:
    """The settings of the run that a prompt's own stand in place of."""
    found = {name for name, value in prompt.settings.items() if value is not None}
    if found & {*STEP_SETTINGS}:
        found |= {*STEP_SETTINGS}
    if "scheduler" in found:
        found.add("scheduler_options")
    if prompt.seeds is not None or prompt.num_images_per_prompt is not None:
        found.add("num_images_per_prompt")
    return found


def refuse_several(parts: Sequence[Part], flag: str) -> None:
    """Raise `BadSettingError` for what needs that all images have the same settings."""
    if len(parts) > 1:
        raise BadSettingError(
            f"{flag} is for runs whose images have the same settings: leave it out, or the "
            "prompts' own settings"
        )
