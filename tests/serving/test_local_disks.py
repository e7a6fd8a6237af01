"""Which folders are on disks of this machine."""

from pathlib import Path
from typing import NamedTuple

import pytest

from common.errors import BadSettingError
from common.serving import local_disks
from common.serving.local_disks import refuse_network_file_system
from tests.refusals import refusal


def test_a_folder_on_a_network_file_system_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Mount(NamedTuple):
        mountpoint: str
        fstype: str

    mounts = [Mount("/", "ext4"), Mount(str(tmp_path), "nfs4")]
    monkeypatch.setattr(local_disks.psutil, "disk_partitions", lambda all: mounts)
    with refusal(BadSettingError, "is on a network file system (nfs4)"):
        refuse_network_file_system(tmp_path / "jobs")
    mounts.append(Mount(str(tmp_path / "local"), "ext4"))
    refuse_network_file_system(tmp_path / "local" / "jobs")
