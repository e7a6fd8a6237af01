"""What a normal run prints, and its warnings."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

_said: set[str] | None = None  # where a line is said once


@contextmanager
def each_once(said: set[str]) -> Iterator[None]:
    """Within the block what is among `said` is not said again; what is said joins it."""
    global _said
    before, _said = _said, said
    try:
        yield
    finally:
        _said = before


def say(text: str) -> None:
    """Print one line of a normal run."""
    if _is_new(text):
        print(text, flush=True)


def warn(text: str) -> None:
    """Print a warning."""
    if _is_new(text):
        print(f"warning: {text}", file=sys.stderr, flush=True)


def _is_new(text: str) -> bool:
    if _said is None:
        return True
    is_new = text not in _said
    _said.add(text)
    return is_new
