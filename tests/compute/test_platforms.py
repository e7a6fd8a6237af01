"""What computes here, told without importing jax."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from common.compute import platforms
from common.compute.platforms import has_only_cpus, has_tpu_files, usable_cores
from tests.conftest import PROJECT_DIR


@pytest.mark.parametrize(
    ("files", "expected"),
    [([], False), (["null", "kvm"], False), (["accel0"], True), (["vfio/0"], True)],
)
def test_a_system_with_and_without_tpu_chips(
    tmp_path: Path, files: list[str], expected: bool
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert has_tpu_files(tmp_path) == expected


def test_jax_has_what_its_platforms_say(monkeypatch: pytest.MonkeyPatch) -> None:
    for named, expected in (("cpu", True), ("tpu", False), ("tpu,cpu", False)):
        monkeypatch.setenv("JAX_PLATFORMS", named)
        assert has_only_cpus() == expected


@pytest.mark.parametrize(
    ("plugin", "libtpu", "chips", "expected"),
    [
        (False, False, False, True),
        (False, True, False, True),  # it only compiles for chips that are elsewhere
        (False, True, True, False),
        (True, False, False, False),
    ],
)
def test_what_is_installed_tells(
    monkeypatch: pytest.MonkeyPatch, plugin: bool, libtpu: bool, chips: bool, expected: bool
) -> None:
    installed = {"jax_plugins": plugin, "libtpu": libtpu}
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(platforms, "find_spec", lambda name: installed[name] or None)
    monkeypatch.setattr(platforms, "entry_points", lambda group: [])
    monkeypatch.setattr(platforms, "has_tpu_files", lambda folder: chips)
    assert has_only_cpus() == expected


def test_jax_is_not_imported_for_it() -> None:
    program = (
        "import sys\n"
        "from common.compute import backends, options, platforms\n"
        "platforms.has_only_cpus(), platforms.usable_cores()\n"
        "backends.expected_backend(options.RunOptions(), torch_on_cpus=True)\n"
        "assert not {'jax', 'torch'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=PROJECT_DIR)


def test_cores_are_those_that_the_process_may_use() -> None:
    process = psutil.Process()
    before = process.cpu_affinity()
    assert usable_cores() == len(before)
    try:
        process.cpu_affinity(before[:1])
        assert usable_cores() == 1
    finally:
        process.cpu_affinity(before)
