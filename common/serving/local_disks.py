"""Folders whose locks of files have to hold: on a disk of this machine."""

import os
from contextlib import suppress
from pathlib import Path

import psutil

from common.errors import BadSettingError

# Where locks of files are not those of one machine, or are not kept at all.
NETWORK_FILE_SYSTEMS = (
    *("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "lustre", "ceph", "glusterfs", "beegfs"),
    *("fuse.sshfs", "fuse.gcsfuse", "fuse.s3fs", "fuse.glusterfs", "afs", "gpfs"),
)


def refuse_network_file_system(folder: Path) -> None:
    """Raise `BadSettingError` where a folder's locks would not hold."""
    path = folder.resolve()
    found = [
        each for each in psutil.disk_partitions(all=True) if path.is_relative_to(each.mountpoint)
    ]
    if not found:
        return
    mount = max(found, key=lambda each: len(each.mountpoint))
    if mount.fstype in NETWORK_FILE_SYSTEMS:
        raise BadSettingError(
            f"the jobs folder {folder} is on a network file system ({mount.fstype}), where SQLite "
            "cannot lock its file: choose a folder on a disk of this machine"
        )


def make_own_file(path: Path) -> None:
    """Make an empty file for its owner alone, where there is none.

    One that is there is not opened: with any file that a process closes go all locks that it has
    there (POSIX), those of a database's transaction in another thread as well.
    """
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o600))
