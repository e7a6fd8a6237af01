"""All texts that a prompt with alternatives stands for, by the dynamicprompts library.

    a {red|blue} {star|ring}, __colors__

Its syntax: https://github.com/adieyal/dynamicprompts/blob/main/docs/SYNTAX.md. Chances have no
meaning where all combinations are made.
"""

import logging
import re
from pathlib import Path

from common.conditions.prompt_settings import AskedPrompts, PromptSettings
from common.errors import BadInputFileError, BadSettingError, shorten
from common.messages import warn

_BY_CHANCE = re.compile(r"(\{|__)[~@]")  # samplers of the syntax other than of all combinations
_ALTERNATIVES = re.compile(r"\{[^{}]*\|[^{}]*\}|__\S+?__")
MOST_COMBINATIONS = 10_000  # of one prompt, so that a wrong one is refused before it takes memory


def with_combinations(
    prompts: tuple[PromptSettings, ...], settings: AskedPrompts
) -> tuple[PromptSettings, ...]:
    """The prompts, each in all of its combinations; the rest of each stays, ids are numbered.

    Raises:
        BadSettingError: a prompt cannot be read, or is too many.
        BadInputFileError: there is no folder of that name.
    """
    if settings.prompt_syntax is None:
        if settings.wildcards is not None:
            raise BadSettingError("--wildcards is for --prompt_syntax dynamic: give that as well")
        return prompts
    if settings.wildcards is not None and not settings.wildcards.is_dir():
        raise BadInputFileError(f"--wildcards {settings.wildcards} is no folder")
    others = ("prompt_2", "negative_prompt", "negative_prompt_2")
    if any(_ALTERNATIVES.search(getattr(p, name) or "") for p in prompts for name in others):
        warn("--prompt_syntax dynamic is for prompts alone: other texts are taken as they stand")
    found = []
    for prompt in prompts:
        texts = combinations(prompt.prompt, settings.wildcards)
        for number, text in enumerate(texts):
            own = {"prompt": text}
            if prompt.id is not None and len(texts) > 1:
                own["id"] = f"{prompt.id}_{number:04d}"
            found.append(prompt.model_copy(update=own))
    return tuple(found)


def combinations(text: str, wildcards: Path | None) -> list[str]:
    """All texts that one with alternatives stands for, each once, in the library's order.

    Args:
        wildcards: a folder of texts with a value a line, which `__name__` stands for.
    """
    from dynamicprompts.generators import CombinatorialPromptGenerator
    from dynamicprompts.wildcards import WildcardManager
    from pyparsing import ParseBaseException

    said = f"--prompt_syntax dynamic: the prompt {shorten(text, 60)!r}"
    if "#" in text:
        warn(f"{said} has a #: what follows it in the line is a comment there, and left out")
    if chance := _BY_CHANCE.search(text):
        where = text[chance.start() : chance.start() + 20]
        raise BadSettingError(
            f"{said} chooses by chance or in turn at {where!r}: all combinations are made; leave ~ "
            "and @ out"
        )
    generator = CombinatorialPromptGenerator(wildcard_manager=WildcardManager(wildcards))
    listener = _RefuseMissing(said, wildcards)
    logger = logging.getLogger("dynamicprompts")
    logger.addHandler(listener)
    try:
        found = list(generator.generate(text, max_prompts=MOST_COMBINATIONS + 1))
    except ParseBaseException as error:
        where = f"at {text[error.loc : error.loc + 20]!r}"
        raise BadSettingError(f"{said} cannot be read {where}: close every {{ and __") from None
    finally:
        logger.removeHandler(listener)
    if len(found) > MOST_COMBINATIONS:
        raise BadSettingError(f"{said} has more than {MOST_COMBINATIONS} combinations: give fewer")
    return [*dict.fromkeys(found)] or [text]


class _RefuseMissing(logging.Handler):
    """Raises where the library only logs that a wildcard has no values, and gives its name back."""

    def __init__(self, said: str, wildcards: Path | None) -> None:
        super().__init__(logging.WARNING)
        self._said, self._wildcards = said, wildcards

    def emit(self, record: logging.LogRecord) -> None:
        """Raise `BadSettingError`."""
        folder = "--wildcards names no folder" if self._wildcards is None else self._wildcards
        raise BadSettingError(f"{self._said}: {record.getMessage()} ({folder})")
