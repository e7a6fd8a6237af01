"""The prompts of a run, from flags or from a file."""

import csv
import io
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from common.conditions.prompt_settings import AskedPrompts, PromptSettings
from common.conditions.sizes import AskedSize
from common.declared import validate
from common.errors import BadInputFileError, BadSettingError
from common.runs.setting_groups import ASKED, SHARED, own_settings
from common.sampling.sampling_settings import merge_settings, parse_scheduler_options
from common.text_files import parse_json, parse_json_at, read_text

_BLANKS = re.compile(r"[ \t\r\n]*")  # JSON's
# The values of each prompt, with the line that they stand in.
Prompts = Iterator[tuple[int, dict[str, Any]]]


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
    """Read the prompts of a file, by its name's ending in any letter case.

    - `.jsonl`, `.ndjson`: a JSON object a line, with `prompt` and where wanted other fields of
      `PromptSettings`;
    - `.json`: a list of such objects, or of texts;
    - `.csv`: the same names in a header, a prompt a row; an empty cell says nothing;
    - any other: a prompt a line, or JSON objects if each line is one.

    Lines end with \\n or \\r\\n alone. Blank ones are passed over. Without its own, a prompt
    has the run's negative prompts.

    Raises:
        BadSettingError: a line cannot be read, or holds what no prompt has.
        BadInputFileError: the file cannot be read.
    """
    if settings.prompt_2 is not None:
        raise BadSettingError(
            f"give either --prompt_2 or --prompts_file, not both: {path} can hold prompt_2"
        )
    try:
        text = read_text(path)
    except FileNotFoundError:
        raise BadInputFileError(f"--prompts_file {path} does not exist") from None
    except (OSError, ValueError) as error:
        raise BadInputFileError(f"--prompts_file {path} cannot be read: {error}") from None
    read = _READERS.get(path.suffix.lower(), _plain_lines)
    prompts = []
    for number, values in read(text, path):
        prompts.append(prompt_of(values, settings, f"{path}, line {number}"))
    if not prompts:
        raise BadSettingError(f"--prompts_file {path} holds no prompt: write one a line")
    return tuple(prompts)


class _OwnSettings(*reversed([*SHARED, AskedSize])):  # type: ignore[misc]
    """Settings of a run, of which a prompt may have some."""


_OF_RUNS = {name for group in (*ASKED, *SHARED) for name in group.model_fields}


def prompt_of(values: dict[str, Any], settings: AskedPrompts, where: str) -> PromptSettings:
    """A prompt, and the settings of the run that it has its own of.

    Args:
        values: of a line, which are changed.
        settings: the run's, whose negative prompts it has where it says none.

    Raises:
        BadSettingError: a name or value that is wrong, or a setting that is the whole run's.
    """
    if "negative_prompt" not in values:
        values["negative_prompt"] = settings.negative_prompt
        values.setdefault("negative_prompt_2", settings.negative_prompt_2)
    if "settings" in values:
        raise BadSettingError(f"{where}: settings stand beside the prompt, each by its name")
    own = {name: values.pop(name) for name in own_settings() if name in values}
    if isinstance(options := own.get("scheduler_options"), str):  # a table's cell
        own["scheduler_options"] = parse_scheduler_options(options.split())
    if "lora" in values:
        raise BadSettingError(f"{where}: lora is called loras here, a list of FILE:SCALE")
    for name in values:
        if name in _OF_RUNS and name not in PromptSettings.model_fields:
            raise BadSettingError(
                f"{where}: {name} is a setting of the whole run: give it as a flag, or in --config"
            )
    if isinstance(loras := own.get("loras"), str):  # likewise
        parts = [] if loras.strip() == "[]" else loras.split(";")
        own["loras"] = [part.strip() for part in parts if part.strip()]
    for name in ("height", "width", "loras"):
        if own.get(name, 0) is None:  # the run's
            del own[name]
    merged = merge_settings({}, own, where)
    checked = validate(_OwnSettings, merged, where).model_dump(mode="json", include={*own})
    return validate(PromptSettings, {**values, "settings": checked}, where)


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers."""
    # Not str.splitlines, for which U+2028, form feeds and more end a line.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line.removesuffix("\r")


def _plain_lines(text: str, path: Path) -> Prompts:
    lines = list(_lines(text))
    if lines and all(_is_json_object(line) for _, line in lines):
        yield from _json_lines(text, path)
        return
    for number, line in lines:
        yield number, {"prompt": line.strip()}


def _is_json_object(line: str) -> bool:
    try:
        return line.lstrip().startswith("{") and isinstance(parse_json(line), dict)
    except ValueError:
        return False


def _json_lines(text: str, path: Path) -> Prompts:
    for number, line in _lines(text):
        try:
            values = parse_json(line)
        except ValueError as error:
            raise BadSettingError(f"{path}, line {number} is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise BadSettingError(f"{path}, line {number} is not a JSON object")
        yield number, values


def _json_list(text: str, path: Path) -> Prompts:
    """The values of a list, each with the line that it begins in."""
    at = _past_blanks(text, 0)
    if text[at : at + 1] != "[":
        raise BadSettingError(f'{path} is not a JSON list: write [{{"prompt": …}}, …]')
    start, at = 0, _past_blanks(text, at + 1)
    number = 1
    while text[at : at + 1] != "]":
        number += text.count("\n", start, at)
        start = at
        try:
            values, at = parse_json_at(text, at)
        except ValueError as error:
            raise BadSettingError(f"{path}, line {number} is not JSON: {error}") from None
        if isinstance(values, str):
            values = {"prompt": values}
        if not isinstance(values, dict):
            raise BadSettingError(f"{path}, line {number} is neither a JSON object nor a text")
        yield number, values
        at = _past_blanks(text, at)
        more = text[at : at + 1] == ","
        at = _past_blanks(text, at + 1) if more else at
        if more == (text[at : at + 1] == "]"):
            number += text.count("\n", start, at)
            raise BadSettingError(
                f"{path}, line {number} is not JSON: give a comma between two values and ] after "
                "the last"
            )
    if rest := text[at + 1 :].strip():
        number = text.count("\n", 0, text.index(rest, at + 1)) + 1
        raise BadSettingError(f"{path}, line {number} is not JSON: {rest[:20]!r} follows the list")


def _past_blanks(text: str, at: int) -> int:
    found = _BLANKS.match(text, at)
    assert found is not None
    return found.end()


def _table(text: str, path: Path) -> Prompts:
    """The rows of a CSV file with a header, each with the line that it begins in."""
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    number = 1
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise BadSettingError(f"{path}, line {number} is not CSV: {error}") from None
        if row is None:
            return
        number, began = rows.line_num + 1, number
        cells = [cell.strip() for cell in row]
        if not any(cells):
            continue
        if header is None:
            header = [cell.lower() for cell in cells]
            check_header(header, f"{path}, line {began}")
            continue
        if len(cells) > len(header):
            raise BadSettingError(
                f"{path}, line {began} has {len(cells)} cells under a header of {len(header)}: put "
                'texts with commas in quotes (")'
            )
        # An empty cell says nothing, so that the run's negative prompts stand.
        yield began, {name: cell for name, cell in zip(header, cells, strict=False) if cell}


def check_header(header: list[str], where: str) -> None:
    """Raise `BadSettingError` where a table's header is none of prompts."""
    if "prompt" not in header:
        raise BadSettingError(f"{where} is the header, and names no column `prompt`")
    if twice := next((name for name in header if header.count(name) > 1), None):
        raise BadSettingError(f"{where}: the column {twice!r} stands twice")


_READERS: dict[str, Callable[[str, Path], Prompts]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_list,
    ".csv": _table,
}
