"""What a normal run prints, its warnings, and how far it is."""

import math
import os
import sys
import time
from typing import Any, Self

SECONDS_BETWEEN_LINES = 30.0  # of progress, where no bar can be drawn


def say(text: str) -> None:
    """Print one line of a normal run."""
    print(text, flush=True)


def warn(text: str) -> None:
    """Print a warning."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def progress_bar(
    total: int, what: str, unit: str, *, leave: bool = False, hidden: bool = False
) -> Any:
    """How far something is: a bar on a terminal, elsewhere a line now and then.

    Args:
        total: how many units there are.
        leave: let the bar stand when it is done.
        hidden: show nothing.

    Returns:
        A context with `update(number)` and `unpause()`, as tqdm's.
    """
    if hidden or not sys.stderr.isatty():
        return _Lines(total, what, unit, hidden)
    from tqdm import tqdm

    try:
        columns = os.get_terminal_size(sys.stderr.fileno()).columns
    except OSError:
        columns = 0
    # A terminal that does not know its size is one of a program; tqdm would draw nothing.
    width, height = (None, None) if columns else (80, 24)
    return tqdm(total=total, desc=what, unit=unit, leave=leave, ncols=width, nrows=height)


class _Lines:
    """Progress in lines, none in a short run."""

    def __init__(self, total: int, what: str, unit: str, hidden: bool) -> None:
        self.total, self.what, self.unit = total, what, unit
        self.done = 0
        self.due = math.inf if hidden else time.monotonic() + SECONDS_BETWEEN_LINES

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is left to close."""

    def update(self, number: int = 1) -> None:
        """So many more are done."""
        self.done += number
        if time.monotonic() >= self.due and self.done < self.total:
            say(f"  {self.what}: {self.done} of {self.total} {self.unit}s")
            self.due = time.monotonic() + SECONDS_BETWEEN_LINES

    def unpause(self) -> None:
        """A line says no rate that a pause would spoil."""
