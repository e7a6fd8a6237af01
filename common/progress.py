"""How far something is: a bar on a terminal, elsewhere a line now and then; JSON for programs."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, Protocol, Self

from common.errors import shorten
from common.messages import say

Form = Literal["auto", "lines", "json", "off"]
SECONDS_BETWEEN_LINES = 30.0
SECONDS_BETWEEN_OBJECTS = 1.0  # of JSON; the first and the last always come
MOST_AT_WORK = 40  # characters of a prompt

# What is made, as it is now: an image's number → its array.
Look = Callable[[], Mapping[int, Any]]


class Watcher(Protocol):
    """Is told how far what this process does is, besides those who read what it says."""

    def wants_look(self) -> bool:
        """Whether it is time for a look at what is made."""

    def hear(self, shown: "Shown", look: Look | None) -> None:
        """Something has begun, or more of it is done."""


_form: Form = "auto"
_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)  # a thread's own


def show_progress_as(form: Form) -> None:
    """Choose how this process shows its progress; `auto` is a bar on a terminal, else lines."""
    global _form
    _form = form


@contextmanager
def watched_by(watcher: Watcher) -> Iterator[None]:
    """Within the block a watcher is told of all that `progress_bar` shows in this thread."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


class Shown:
    """How far something is, shown to nobody."""

    watcher: Watcher | None = None

    def __init__(self, total: int, what: str, unit: str, images: int | None = None) -> None:
        """
        Args:
            total: how many units there are.
            images: how many images all of them are; None where these are the units.
        """
        self.total, self.what, self.unit = total, what, unit
        self.images = total if images is None else images
        self.done = 0
        self.at_work = ""
        self._skipped = 0
        self._began = self._last = time.monotonic()

    def __enter__(self) -> Self:
        if self.watcher is not None:
            self.watcher.hear(self, None)
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is left to close."""

    def skip(self, number: int) -> None:
        """So many more were done by an earlier run."""
        self._skipped += number
        self._count(number)

    def update(self, number: int = 1, look: Look | None = None) -> None:
        """So many more are done.

        Args:
            look: at what is made, where the watcher wanted one.
        """
        self._count(number, look)

    def unpause(self) -> None:
        """What took time since the last step was none: a compilation, say."""
        now = time.monotonic()
        self._began += now - self._last
        self._last = now

    def note(self, text: str) -> None:
        """Say which image is at work, by its prompt."""
        self.at_work = shorten(text, MOST_AT_WORK)

    @property
    def rate(self) -> float | None:
        """Units a second, of those that this run did; None before the first."""
        seconds = self._last - self._began
        done = self.done - self._skipped
        return done / seconds if done and seconds > 0 else None

    @property
    def images_per_second(self) -> float | None:
        """Images a second."""
        return None if self.rate is None else self.rate * self.images / self.total

    @property
    def seconds_left(self) -> float | None:
        """How long the rest will take at this rate."""
        return None if self.rate is None else (self.total - self.done) / self.rate

    def _count(self, number: int, look: Look | None = None) -> None:
        self.done += number
        self._last = time.monotonic()
        self._show(number)
        if self.watcher is not None:
            self.watcher.hear(self, look)

    def _show(self, number: int) -> None:
        """Show that so many more are done."""


class _Lines(Shown):
    """A line now and then, none in a short run."""

    def __init__(self, *what: Any) -> None:
        super().__init__(*what)
        self._due = time.monotonic() + SECONDS_BETWEEN_LINES

    def _show(self, _: int) -> None:
        if time.monotonic() < self._due or self.done >= self.total:
            return
        self._due = time.monotonic() + SECONDS_BETWEEN_LINES
        told = [f"{self.done} of {self.total} {self.unit}s"]
        if self.images_per_second is not None and self.seconds_left is not None:
            minutes, seconds = divmod(round(self.seconds_left), 60)
            kind = "images" if self.unit != "prompt" else "prompts"
            told += [f"{self.images_per_second:.3g} {kind}/s", f"{minutes}:{seconds:02d} left"]
        at_work = f": {self.at_work}" if self.at_work else ""
        say(f"  {self.what}: {', '.join(told)}{at_work}")


class _Objects(Shown):
    """A JSON object a line, on the standard error."""

    def __init__(self, *what: Any) -> None:
        super().__init__(*what)
        self._due = 0.0

    def _show(self, _: int) -> None:
        if time.monotonic() < self._due and self.done < self.total:
            return
        self._due = time.monotonic() + SECONDS_BETWEEN_OBJECTS
        names = ("unit", "done", "total", "images", "images_per_second", "seconds_left", "at_work")
        told = {"progress": self.what} | {name: getattr(self, name) for name in names}
        print(json.dumps(told, ensure_ascii=False), file=sys.stderr, flush=True)


class _Bar(Shown):
    """tqdm's bar."""

    def __init__(self, *what: Any, leave: bool) -> None:
        super().__init__(*what)
        from tqdm import tqdm

        try:
            columns = os.get_terminal_size(sys.stderr.fileno()).columns
        except OSError:
            columns = 0
        # A terminal that does not know its size is one of a program; tqdm would draw nothing.
        width, height = (None, None) if columns else (80, 24)
        self._bar = tqdm(
            total=self.total,
            desc=self.what,
            unit=self.unit,
            leave=leave,
            ncols=width,
            nrows=height,
        )

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def unpause(self) -> None:
        """As tqdm's."""
        super().unpause()
        self._bar.unpause()

    def _show(self, number: int) -> None:
        told = (
            []
            if self.unit == "image" or self.images_per_second is None
            else [f"{self.images_per_second:.3g} images/s"]
        )
        if self.at_work:
            told.append(self.at_work)
        self._bar.set_postfix_str(", ".join(told), refresh=False)
        self._bar.update(number)


def progress_bar(
    total: int,
    what: str,
    unit: str,
    *,
    images: int | None = None,
    leave: bool = False,
    hidden: bool = False,
) -> Shown:
    """Show how far something is, in the form that was chosen; a context.

    Args:
        total, images: as of `Shown`.
        leave: let the bar stand when it is done.
        hidden: show nothing.
    """
    shown: Shown
    if hidden or _form == "off":
        shown = Shown(total, what, unit, images)
    elif _form == "json":
        shown = _Objects(total, what, unit, images)
    elif _form == "lines" or not sys.stderr.isatty():
        shown = _Lines(total, what, unit, images)
    else:
        shown = _Bar(total, what, unit, images, leave=leave)
    shown.watcher = None if hidden else _watcher.get()
    return shown
