"""What stages that serve print for a program that waits for them."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from common.serving.jobs import Job

SAID_FOLDER = "said"  # of a jobs folder
STREAMS = ("stdout", "stderr")


class SaidByStages:
    """What stages print for a caller, in files from one process to the other."""

    def __init__(self, jobs_dir: Path, job: Job) -> None:
        folder = jobs_dir / SAID_FOLDER
        self._paths = {name: folder / f"{job.number}.{name}" for name in STREAMS}

    @contextmanager
    def reading(self) -> Iterator[Mapping[str, TextIO]]:
        """The files, by the names of streams; they are removed after the block."""
        files = dict[str, TextIO]()
        try:
            for name, path in self._paths.items():
                path.parent.mkdir(exist_ok=True)
                path.touch(mode=0o600)
                files[name] = path.open(encoding="utf-8", errors="replace")
            yield files
        finally:
            for name, path in self._paths.items():
                if name in files:
                    files[name].close()
                path.unlink(missing_ok=True)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Within the block this process prints to the files."""
        before = {name: getattr(sys, name) for name in STREAMS}
        try:
            for name, path in self._paths.items():
                path.parent.mkdir(exist_ok=True)
                own = path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
                setattr(sys, name, own)
            yield
        finally:
            for name, stream in before.items():
                own = getattr(sys, name)
                setattr(sys, name, stream)
                if own is not stream:
                    with suppress(OSError):  # a full disk
                        own.close()
