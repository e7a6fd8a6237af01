"""Errors that end a stage with one sentence and a documented exit code.

Exit codes: 0 done, or fresh and skipped; 1 a defect of ours; 2 a bad flag, setting or input value;
3 an input file is missing, damaged, or does not fit the others; 4 the numbers are not finite;
5 the environment (disk, memory, device, lock); 129 hung up; 130 interrupted;
143 terminated.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError

MOST_NAMED = 20  # things in one sentence
OUT_OF_DEVICE_MEMORY = "RESOURCE_EXHAUSTED"  # in XLA's own message


def in_one_line(error: BaseException) -> str:
    """A library's message as a part of our one sentence, with classes by their names alone."""
    return re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", " ".join(str(error).split()))[:300]


def first_refusal(error: "ValidationError") -> str:
    """The first value that a model refuses: where it is, if that has a name, and why."""
    first = error.errors()[0]
    name = ".".join(map(str, first["loc"]))
    return f"{name}: {first['msg']}" if name else first["msg"]


def shorten(text: str, length: int) -> str:
    """A text's beginning, where it is longer than that."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def listed(names: Sequence[str]) -> str:
    """Names in a sentence, all of them unless they are many."""
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def without_controls(text: str) -> str:
    """A message in which a file's own text can neither break the line nor steer the terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class StageError(Exception):
    """A failure to report as one sentence that names the file or flag and the mend."""

    exit_code = 1


class BadSettingError(StageError):
    """A flag, a setting or an input value is wrong."""

    exit_code = 2


class BadInputFileError(StageError):
    """An input file is missing, damaged, or does not fit the others."""

    exit_code = 3


class NotFiniteError(StageError):
    """A computation gave infinities or not-a-numbers."""

    exit_code = 4


class UnfitEnvironmentError(StageError):
    """The disk, the memory, a device or another process stands in the way."""

    exit_code = 5


def error_of(exit_code: int, said: str) -> StageError:
    """An error that another process had."""
    kinds = (BadSettingError, BadInputFileError, NotFiniteError, UnfitEnvironmentError)
    return next((kind for kind in kinds if kind.exit_code == exit_code), StageError)(said)
