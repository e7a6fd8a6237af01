"""A script's process: its exit codes, the sentence of a failure, how it ends."""

import atexit
import errno
import io
import os
import sys
import traceback
from contextlib import suppress
from typing import NoReturn

from typer.core import TyperCommand
from typer.exceptions import TyperException

from common.errors import (
    OUT_OF_DEVICE_MEMORY,
    StageError,
    in_one_line,
    shorten,
    without_controls,
)
from common.stopping import stop_at_once_on_signals

LESS_MEMORY = (
    "ask for fewer pictures at once (--batch_size), a smaller size, a --mesh over more devices, or "
    "--tile in stage 3"
)


def run_command(command: TyperCommand, called: str | None = None) -> NoReturn:
    """Run a script's command; end the process with the documented exit code.

    Every failure is one sentence; a traceback comes only with `--debug`.

    Args:
        called: how the user calls it; python and the script's name, if None.
    """
    open_streams()
    stop_at_once_on_signals()
    keep_to_ourselves()
    code, message = run_in_process(command, sys.argv[1:], called or f"python {sys.argv[0]}")
    if message is not None:
        print(f"error: {message}", file=sys.stderr, flush=True)
    _leave(code)


def run_in_process(
    command: TyperCommand, arguments: list[str], called: str
) -> tuple[int, str | None]:
    """Run a script's command. Returns the documented exit code, and the sentence of a failure."""
    try:
        return command.main(arguments, prog_name=called, standalone_mode=False) or 0, None
    except Exception as error:
        if "--debug" in arguments and not isinstance(error, TyperException | MemoryError):
            traceback.print_exc()
        code, message = explain(error, called)
        return code, without_controls(message)


def explain(error: Exception, called: str) -> tuple[int, str]:
    """The exit code and the sentence for what ended a script."""
    what = in_one_line(error)
    if isinstance(error, TyperException):
        formatted = getattr(error, "format_message", None)
        message = str(formatted() if formatted else error)
        return 2, f"{message.rstrip('.')} ({called} --help lists the flags)"
    if isinstance(error, StageError):
        return error.exit_code, str(error)
    if isinstance(error, MemoryError):
        return 5, f"out of memory: {LESS_MEMORY}"
    if isinstance(error, OSError):
        named = f"{error.filename}: " if error.filename is not None else ""
        return (
            5,
            f"{shorten(named, 300)}{error.strerror or error}: choose another place, or free it",
        )
    if OUT_OF_DEVICE_MEMORY in what:
        return 5, f"out of memory on the devices ({what}): {LESS_MEMORY}"
    said = f"{type(error).__name__}: {what} (--debug shows where)"
    return 1, f"a defect of this program: {said}"


def open_streams() -> None:
    """Let what is said be no reason to end: where nobody reads it, it is lost.

    Streams that the parent closed (`>&-`, some daemons) lead nowhere, else the first file that is
    opened would take their place; so do those whose reader leaves (`| head -1`) or whose disk is
    full. A name that the terminal's encoding does not have is spelled out.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        binary = os.fdopen(number, "wb", closefd=False) if stream is None else stream.detach()
        encoding = getattr(stream, "encoding", None) or "utf-8"
        setattr(sys, name, _Said(binary, encoding, "backslashreplace", line_buffering=True))


class _Said(io.TextIOWrapper):
    """A stream that leads nowhere from the moment on that it cannot be written to."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._lose(error)
        return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
        if error.errno != errno.EPIPE and self.fileno() != 2:
            said = f"warning: standard output cannot be written ({error.strerror}); it is lost\n"
            os.write(2, said.encode())


def keep_to_ourselves() -> None:
    """Turn the telemetry of the libraries off; they read this when they are imported."""
    for name in ("HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        os.environ[name] = "1"


def _leave(code: int) -> NoReturn:
    """End the process: what is registered for its exit is run, the interpreter not taken apart.

    That takes more than a second with torch and jax loaded, and nothing waits for it.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)
