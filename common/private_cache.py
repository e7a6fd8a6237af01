"""The user's cache folder, in which nobody else may write: what stands there is trusted.

A compiled program out of it is run as it is, and a remembered hash stands for a file's content.
"""

import os
import stat
from pathlib import Path

from common.errors import UnfitEnvironmentError

NAME = "staged-diffusion"


def folder() -> Path:
    """The project's folder in the user's cache, made where it is not there.

    A relative XDG_CACHE_HOME is ignored, as the XDG base directory specification says.

    Raises:
        UnfitEnvironmentError: as `refuse_if_others_write`.
    """
    cache = os.environ.get("XDG_CACHE_HOME", "")
    path = (Path(cache) if Path(cache).is_absolute() else Path.home() / ".cache") / NAME
    make_private(path)
    return path


def make_private(path: Path) -> None:
    """Make a folder that its owner alone can read; raise where one is there that others can write.

    In a place that cannot be written there is no cache, and no error.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
    except OSError:
        return
    refuse_if_others_write(path)


def refuse_if_others_write(path: Path) -> None:
    """Raise `UnfitEnvironmentError` where a folder is another user's, or others can write to it."""
    status = path.stat()
    others_write = bool(status.st_mode & (stat.S_IWGRP | stat.S_IWOTH))
    if others_write or status.st_uid not in (0, os.getuid()):
        whose = "can be written by others" if others_write else "belongs to another user"
        raise UnfitEnvironmentError(
            f"the cache folder {path} {whose}, who could have code of theirs run through it: "
            f"remove it, or make it your own with chmod go-w {path}"
        )
