"""The chips of this machine that a process takes, so that others can have the rest."""

import os
import re
import socket
from collections.abc import Sequence

from common.compute.platforms import has_only_cpus, may_have_tpu
from common.errors import BadSettingError

# How so many of a host's chips lie; libtpu opens no other numbers of them.
TPU_BOUNDS = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1", 8: "2,4,1"}
MOST = 1024  # chips or cores, so that a wrong number is refused before it takes memory


def parse_chips(text: str) -> list[int]:
    """The chips that a text such as "0-3,6" names, in their order.

    Raises:
        BadSettingError: it names none.
    """
    chips: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,4})(?:-(\d{1,4}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < MOST:
            raise BadSettingError(f"--chips {text} is not understood: give numbers, as 0-3 or 0,2")
        chips.update(range(first, last + 1))
    return sorted(chips)


def check_shares(texts: Sequence[str]) -> None:
    """Raise `BadSettingError` where processes do not get as many each, of their own."""
    seen: dict[int, str] = {}
    for text in texts:
        chips = parse_chips(text)
        if len(chips) != (count := len(parse_chips(texts[0]))):
            raise BadSettingError(
                f"--chips {text}: give each process as many as --chips {texts[0]}, {count}"
            )
        for chip in chips:
            if chip in seen:
                raise BadSettingError(f"--chips {seen[chip]} and --chips {text} both name {chip}")
            seen[chip] = text


def take_chips(text: str, backend: str) -> None:
    """Let this process see the chips that a text names alone; before jax or PyTorch start.

    Those of a TPU or a GPU; where there are CPUs alone, and for PyTorch, cores. Whether a TPU or a
    GPU has them shows when jax has started (`jax_start.refuse_other_chips`).

    Args:
        backend: as `--backend` takes it.

    Raises:
        BadSettingError: there are no such cores, or a TPU's chips cannot be opened so.
    """
    chips = parse_chips(text)
    if backend == "torch" or has_only_cpus():
        _take_cores(text, chips)
    elif may_have_tpu():
        count, first = len(chips), chips[0]
        if count not in TPU_BOUNDS or first % count or chips[-1] != first + count - 1:
            raise BadSettingError(
                f"--chips {text}: a TPU's chips are opened by {', '.join(map(str, TPU_BOUNDS))}: "
                "give one, as 3, or some that lie together, as 2-3, 4-7, 0-7"
            )
        # An address of its own, without which libtpu takes it for a second process of all chips.
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        os.environ |= {
            "TPU_VISIBLE_CHIPS": ",".join(map(str, chips)),
            "TPU_CHIPS_PER_PROCESS_BOUNDS": TPU_BOUNDS[len(chips)],
            "TPU_PROCESS_BOUNDS": "1,1,1",
            "TPU_PROCESS_ADDRESSES": f"localhost:{port}",
            "TPU_PROCESS_PORT": str(port),
            "CLOUD_TPU_TASK_ID": "0",
        }
    else:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = None if seen is None else [name for name in seen.split(",") if name.strip()]
        if names is not None and chips[-1] >= len(names):
            raise _none_such(text, f"CUDA_VISIBLE_DEVICES {seen} has {len(names)}")
        own = map(str, chips) if names is None else (names[chip] for chip in chips)
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(own)


def _take_cores(text: str, chips: list[int]) -> None:
    """Bind this thread, and those it starts from now on, to cores."""
    if not hasattr(os, "sched_setaffinity"):
        raise BadSettingError(
            f"--chips {text}: this system binds no process to cores: leave it out"
        )
    cores = sorted(os.sched_getaffinity(0))
    if chips[-1] >= len(cores):
        raise _none_such(text, f"this process may use {len(cores)} core(s)")
    os.sched_setaffinity(0, {cores[chip] for chip in chips})


def _none_such(text: str, there: str) -> BadSettingError:
    return BadSettingError(f"--chips {text}: {there}, which are numbered from 0")
