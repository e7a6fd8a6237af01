"""Several processes that compute together, and which of them writes."""

import re
import socket
import time
from typing import Any

import jax

from common.errors import BadSettingError, UnfitEnvironmentError, in_one_line

SECONDS_TO_MEET = 300.0  # as long as jax waits

MOST_PORT = 65_535


def join_processes(distributed: str) -> None:
    """Make this process one of several that compute together.

    Args:
        distributed: `auto` on a TPU slice, whose hosts find each other; else the first process's
            address, the number of processes and this one's index, HOST:PORT,COUNT,INDEX.

    Raises:
        BadSettingError: not of that form.
        UnfitEnvironmentError: the processes do not find each other.
    """
    match = re.fullmatch(r"(.+:(\d{1,5})),([1-9]\d{0,5}),(\d{1,6})", distributed)
    if distributed != "auto" and (
        match is None or int(match[2]) > MOST_PORT or int(match[4]) >= int(match[3])
    ):
        raise BadSettingError(
            f"--distributed {distributed} is not understood: give auto on a TPU slice, else "
            "HOST:PORT,COUNT,INDEX with an index from 0"
        )
    found: dict[str, Any] = {}
    if match is not None:
        meet_at(match[1], is_first=int(match[4]) == 0)
        found = {
            "coordinator_address": match[1],
            "num_processes": int(match[3]),
            "process_id": int(match[4]),
        }
    try:
        jax.distributed.initialize(**found)
    except (RuntimeError, ValueError) as error:
        raise UnfitEnvironmentError(
            f"--distributed {distributed}: the processes do not find each other "
            f"({in_one_line(error)}): start all of them, or name the first one's address as "
            "HOST:PORT,COUNT,INDEX"
        ) from None


def meet_at(address: str, *, is_first: bool, patience: float = SECONDS_TO_MEET) -> None:
    """Wait until the first process can be reached; for that one, see that its port is free.

    jax itself would end this process without a word after minutes.

    Args:
        patience: seconds.

    Raises:
        UnfitEnvironmentError: the address is of no use; names it.
    """
    host, _, port = address.rpartition(":")
    said = f"--distributed: {address}"
    until = time.monotonic() + patience
    while True:
        try:
            if is_first:
                with socket.create_server(("", int(port))):
                    return
            with socket.create_connection((host.strip("[]"), int(port)), timeout=5):
                return
        except OSError as error:
            if is_first or not isinstance(error, ConnectionRefusedError | TimeoutError):
                raise UnfitEnvironmentError(
                    f"{said} cannot be used ({in_one_line(error)}): name a free port of the first "
                    "process's host, as HOST:PORT,COUNT,INDEX"
                ) from None
            if time.monotonic() > until:
                raise UnfitEnvironmentError(
                    f"{said} does not answer: start the first process, or name its address as "
                    "HOST:PORT,COUNT,INDEX"
                ) from None
        time.sleep(0.5)


def is_first_process() -> bool:
    """Whether this is the process that writes: the only one, or the first of several."""
    return bool(jax.process_index() == 0)
