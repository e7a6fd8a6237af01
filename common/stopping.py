"""Signals to stop: at once, or when what runs is done and kept."""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from common.errors import StageError
from common.messages import say
from common.whole_files import remove_unfinished

# Signal → what it is called, and the exit code of a process that it stopped.
STOP_SIGNALS: dict[int, tuple[str, int]] = {
    signal.SIGINT: ("interrupted", 130),
    signal.SIGTERM: ("terminated", 143),
    signal.SIGHUP: ("hung up", 129),
}
# One signal often comes twice: to a process by its group, and passed on by the one that began it.
SECONDS_OF_ONE_SIGNAL = 1.0
SECONDS_UNTIL_SAID = 10.0  # of what a compiler's own code does

_stops_at_once = 0  # blocks that run in which a signal stops at once


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


def ends_this_process(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a handler of a signal to stop as one of a process of ours, which the signal ends.

    In a notebook, say, it ends what runs, not the process.
    """
    handler.ends_this_process = True  # type: ignore[attr-defined]
    return handler


def heard_signals() -> list[int]:
    """The signals to stop that this process hears: a parent may have had some ignored.

    A shell without job control has SIGINT and SIGQUIT ignored in whatever it starts with `&`; that
    nobody asked for, and a SIGINT that comes then was meant.
    """
    ignored = {number for number in STOP_SIGNALS if signal.getsignal(number) == signal.SIG_IGN}
    if signal.getsignal(signal.SIGQUIT) == signal.SIG_IGN:
        ignored.discard(signal.SIGINT)
    return [number for number in STOP_SIGNALS if number not in ignored]


def hold_signals() -> None:
    """Let signals to stop wait until this process, or the program that it becomes, hears them.

    Python's own handlers would end the imports of a script that was begun with a traceback.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


@contextmanager
def holding_signals() -> Iterator[None]:
    """Within the block `hold_signals`; a process that is begun there goes on holding them.

    Not by a function that runs in the child before it is a program: that may wait for ever for a
    lock which another thread of the parent has.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def stop_at_once_on_signals() -> None:
    """End the process with a sentence when a signal to stop comes, or one was held."""
    for number in heard_signals():
        signal.signal(number, stop_now)
    let_signals_through()


def let_signals_through() -> None:
    """Hear the signals that were held, and those to come."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


@contextmanager
def finishing_first() -> Iterator[StopRequest]:
    """Within the block, a first signal to stop is only noted; a second one stops at once."""
    request, came = StopRequest(), 0.0

    @ends_this_process
    def note(number: int, frame: FrameType | None) -> None:
        nonlocal came
        if _stops_at_once:
            stop_now(number)
        if request.number is not None:
            if time.monotonic() - came > SECONDS_OF_ONE_SIGNAL:
                stop_now(number)
            return
        request.number, came = number, time.monotonic()
        below_the_bar = "\n" if sys.stderr.isatty() else ""
        said = "  stopping when what runs is done; the signal once more stops at once\n"
        os.write(2, (below_the_bar + said).encode())

    before = {number: signal.signal(number, note) for number in heard_signals()}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stopping_at_once(doing: str) -> Iterator[None]:
    """Within the block a signal to stop ends the process in moments.

    Also while a library's own code runs that returns to Python only after minutes, as compilers do:
    Python's handlers wait for that, so another thread hears the signal. What takes long is said.

    Args:
        doing: what is done, for a line that says how long it has been at it.
    """
    global _stops_at_once
    ours = {n for n in heard_signals() if hasattr(signal.getsignal(n), "ends_this_process")}
    if threading.current_thread() is not threading.main_thread() or not ours:
        yield  # signals are the main thread's
        return
    heard, said = os.pipe()
    os.set_blocking(said, False)
    before = signal.set_wakeup_fd(said, warn_on_full_buffer=False)
    arguments = heard, doing, ours
    watching = threading.Thread(target=_watch, args=arguments, daemon=True)
    watching.start()
    _stops_at_once += 1
    try:
        yield
    finally:
        _stops_at_once -= 1
        signal.set_wakeup_fd(before)
        os.write(said, b"\0")
        watching.join()
        os.close(heard)
        os.close(said)


def _watch(heard: int, doing: str, signals: set[int]) -> None:
    """Wait for a signal or the end of a block; say now and then what the block does."""
    began, due = time.monotonic(), SECONDS_UNTIL_SAID
    while True:
        ready, _, _ = select.select([heard], [], [], max(0.0, began + due - time.monotonic()))
        if not ready:
            say(f"  {doing} for {due:.0f} s now")
            due *= 2
            continue
        number = os.read(heard, 1)[0]
        if number in signals:
            stop_now(number)
        if number == 0:
            return


@ends_this_process
def stop_now(number: int, _frame: FrameType | None = None) -> NoReturn:
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
