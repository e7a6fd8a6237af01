"""One writer for each run directory."""

import json
import os
import shlex
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from filelock import FileLock, Timeout

from common.errors import UnfitEnvironmentError
from common.text_files import parse_json, read_text
from common.whole_files import keep_if_stopped, remove_if_stopped, remove_leftovers

# The first is held by whoever runs stages, one stage or all; the second by each stage, also where
# the program that started it was killed; the third by whoever writes pictures, which may be done
# while another stage runs.
RUN_LOCK, STAGE_LOCK, PICTURES_LOCK = ".run.lock", ".stage.lock", ".pictures.lock"
# Names the run directory whose lock the program that started this stage holds.
HELD_BY_PARENT = "STAGED_DIFFUSION_RUN_LOCK"


class RunLock:
    """The locks that this process holds on a run directory; the system frees those of dead ones."""

    def __init__(self, run_dir: Path, *, wait: bool, names: tuple[str, ...]) -> None:
        """
        Args:
            wait: for another holder to end, in place of an error.
            names: of those above.
        """
        self.run_dir = run_dir
        self.wait = wait
        self.names = names
        self._later: tuple[str, ...] = ()
        self.held: list[FileLock] = []
        self.made_folder = False

    @classmethod
    def of_stage(
        cls,
        run_dir: Path,
        *,
        wait: bool,
        writes: bool = True,
        of_pictures: bool = False,
        beside: bool = False,
    ) -> "RunLock":
        """The locks of one stage; none for a process that does not write.

        Args:
            of_pictures: whether it writes pictures.
            beside: whether it does so while the stage before it runs: `is_alone` tells when it
                holds the other locks as well.
        """
        by_parent = os.environ.get(HELD_BY_PARENT) == os.fspath(run_dir.resolve())
        names = (STAGE_LOCK,) if by_parent else (RUN_LOCK, STAGE_LOCK)
        own = (PICTURES_LOCK,) if of_pictures else ()
        lock = cls(run_dir, wait=wait, names=(*names, *own) if writes else ())
        if beside and writes:
            lock.names, lock._later = own, names
        return lock

    def is_alone(self) -> bool:
        """Whether the stage before has ended; then this process holds its locks from here on.

        Raises:
            UnfitEnvironmentError: another process has taken one of them meanwhile.
        """
        for name in self._later:
            lock = FileLock(self.run_dir / name, timeout=0)
            try:
                lock.acquire()
            except Timeout:
                return False
            lock.release()
        self.names, self._later = (*self.names, *self._later), ()
        self.acquire()
        return True

    def acquire(self, *, make_folder: bool = True) -> None:
        """Take the locks that are not held yet.

        In a folder that cannot be written there is nothing to protect, and no lock.

        Raises:
            UnfitEnvironmentError: another process holds one; names it.

        Args:
            make_folder: where it is not there; else there is nothing to lock yet.
        """
        if not make_folder and not self.run_dir.is_dir():
            return
        for name in self.names[len(self.held) :]:
            path = self.run_dir / name
            try:
                self.made_folder = self.made_folder or not self.run_dir.exists()
                self.run_dir.mkdir(parents=True, exist_ok=True)
                lock = FileLock(path, timeout=0)
                try:
                    lock.acquire()
                except Timeout:
                    self._refuse_or_wait(path, lock)
                path.write_text(json.dumps(_describe_this_process()), encoding="utf-8")
            except OSError as error:
                if self.run_dir.exists() and not self.run_dir.is_dir():
                    raise UnfitEnvironmentError(
                        f"--output_dir {self.run_dir} is a file: choose a folder"
                    ) from None
                if not os.access(self.run_dir, os.W_OK):
                    return
                raise UnfitEnvironmentError(
                    f"{path} cannot be used ({error.strerror}): remove it if nobody uses the run "
                    "directory, or choose another --output_dir"
                ) from None
            self.held.append(lock)
            remove_if_stopped(path)
        if STAGE_LOCK in self.names:
            remove_leftovers(self.run_dir)

    def refuse_unwritable(self) -> None:
        """Raise `UnfitEnvironmentError` where the folder cannot take what is to be written."""
        folder = self.run_dir
        if not self.names:
            return
        try:
            TemporaryFile(dir=folder).close()
        except OSError as error:
            if folder.is_symlink() and not folder.exists():
                why = f"is a link to {folder.readlink()}, which is not there: make that folder"
            elif folder.exists():
                why = f"cannot be written ({error.strerror}): make it writable"
            else:
                why = "cannot be made: make the folder above it writable"
            raise UnfitEnvironmentError(f"--output_dir {folder} {why}, or choose another") from None

    def _refuse_or_wait(self, path: Path, lock: FileLock) -> None:
        holder = f"{self.run_dir} is in use by {_describe_holder(path)}"
        if not self.wait:
            raise UnfitEnvironmentError(
                f"{holder}: wait for it with --wait, or choose another --output_dir"
            )
        print(f"waiting: {holder}", file=sys.stderr, flush=True)
        lock.acquire(timeout=-1)

    def release(self) -> None:
        """Give the locks back, and take their files away."""
        while self.held:
            lock = self.held.pop()
            path = Path(lock.lock_file)
            path.unlink(missing_ok=True)
            keep_if_stopped(path)
            lock.release()
        if self.made_folder:
            with suppress(OSError):  # it has files in it
                self.run_dir.rmdir()


def process_of_stage(run_dir: Path) -> int | None:
    """The process that last said that it runs a stage in a folder, which may have died since."""
    try:
        return int(parse_json(read_text(run_dir / STAGE_LOCK))["pid"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _describe_this_process() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])[:200],
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _describe_holder(path: Path) -> str:
    """The process that holds a lock, as it described itself."""
    try:
        holder = parse_json(read_text(path))
        return (
            f"{holder['command']} (process {holder['pid']} on {holder['host']}, since "
            f"{holder['since']})"
        )
    except (OSError, ValueError, LookupError, TypeError):
        return "another process"
