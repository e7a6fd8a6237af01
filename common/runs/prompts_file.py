"""The prompts of a run, from flags or from a file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.conditions.prompt_settings import AskedPrompts, PromptSettings
from common.declared import validate
from common.errors import BadInputFileError, BadSettingError
from common.text_files import parse_json, read_text


def make_prompts(settings: AskedPrompts) -> tuple[PromptSettings, ...]:
    """The prompts that flags or a config file name, each with its texts for both encoders."""
    seconds: Sequence[str | None] = settings.prompt_2 or (None,)
    if len(seconds) not in (1, len(settings.prompt)):
        raise BadSettingError(
            f"--prompt_2 is given {len(seconds)} times for {len(settings.prompt)} prompts: give it "
            "once for all, or once for each"
        )
    if len(seconds) == 1:
        seconds = [seconds[0]] * len(settings.prompt)
    return tuple(
        validate(
            PromptSettings,
            {
                "prompt": prompt,
                "prompt_2": second,
                "negative_prompt": settings.negative_prompt,
                "negative_prompt_2": settings.negative_prompt_2,
            },
            "the settings",
        )
        for prompt, second in zip(settings.prompt, seconds, strict=True)
    )


def read_prompts_file(path: Path, settings: AskedPrompts) -> tuple[PromptSettings, ...]:
    """Read one prompt a line, or JSON objects where the name ends in `.jsonl`.

    A JSON line has `prompt` and may have `prompt_2`, `negative_prompt` (null: none),
    `negative_prompt_2` and `seed`; without its own, a prompt has the run's negative prompts. Blank
    lines are passed over.
    """
    if settings.prompt_2 is not None:
        raise BadSettingError(
            f"give either --prompt_2 or --prompts_file, not both: {path} can hold prompt_2"
        )
    try:
        lines = read_text(path).splitlines()
    except FileNotFoundError:
        raise BadInputFileError(f"--prompts_file {path} does not exist") from None
    except (OSError, ValueError) as error:
        raise BadInputFileError(f"--prompts_file {path} cannot be read: {error}") from None
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        values: Any = {"prompt": line.strip()}
        if path.suffix == ".jsonl":
            try:
                values = parse_json(line)
            except ValueError as error:
                raise BadSettingError(f"{path}, line {number} is not JSON: {error}") from None
            if not isinstance(values, dict):
                raise BadSettingError(f"{path}, line {number} is not a JSON object")
        if "negative_prompt" not in values:
            values["negative_prompt"] = settings.negative_prompt
            values.setdefault("negative_prompt_2", settings.negative_prompt_2)
        prompts.append(validate(PromptSettings, values, f"{path}, line {number}"))
    if not prompts:
        raise BadSettingError(f"--prompts_file {path} holds no prompt: write one a line")
    return tuple(prompts)
