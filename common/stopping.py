"""Signals to stop: at once, or when what runs is done and kept."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from common.errors import StageError
from common.whole_files import remove_unfinished

# Signal → what it is called, and the exit code of a process that it stopped.
STOP_SIGNALS: dict[int, tuple[str, int]] = {
    signal.SIGINT: ("interrupted", 130),
    signal.SIGTERM: ("terminated", 143),
}


class StoppedError(StageError):
    """A signal stopped the stage after what ran was kept."""

    def __init__(self, number: int, said: str) -> None:
        word, self.exit_code = STOP_SIGNALS[number]
        super().__init__(f"{word} {said}")


class StopRequest:
    """Whether a signal to stop has come."""

    number: int | None = None

    def raise_if_asked(self, said: str) -> None:
        """Raise `StoppedError` if one has come; `said` says what is kept, and how to go on."""
        if self.number is not None:
            raise StoppedError(self.number, said)


def stop_at_once_on_signals() -> None:
    """End the process with a sentence when a signal to stop comes."""
    for number in STOP_SIGNALS:
        signal.signal(number, _stop)


@contextmanager
def finishing_first() -> Iterator[StopRequest]:
    """Within the block, a first signal to stop is only noted; a second one stops at once."""
    request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        if request.number is not None:
            _stop(number, frame)
        request.number = number
        below_the_bar = "\n" if sys.stderr.isatty() else ""
        said = "  stopping when what runs is done; the signal once more stops at once\n"
        os.write(2, (below_the_bar + said).encode())

    before = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, _frame: FrameType | None) -> NoReturn:
    """End the process at once, with a sentence; files appear whole or not at all.

    An exception in its place is lost, or crashes the process, where a library's own code is
    running: a callback, an import; and Python's way out crashes while a device computes.
    """
    word, code = STOP_SIGNALS[number]
    remove_unfinished()
    below_the_bar = "\n" if sys.stderr.isatty() else ""
    said = f"error: {word}; nothing was left half written, the same command starts again\n"
    os.write(2, (below_the_bar + said).encode())
    os._exit(code)
