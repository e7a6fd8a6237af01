"""What computes here, told without importing jax."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from common.compute import platforms
from common.compute.platforms import (
    has_only_cpus,
    has_tpu_files,
    may_have_tpu,
    refuse_unfit_environment,
    usable_cores,
)
from common.errors import UnfitEnvironmentError
from tests.conftest import PROJECT_DIR
from tests.refusals import refusal


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
    monkeypatch.setattr(platforms, "find_spec", lambda name: True)
    monkeypatch.setattr(platforms, "has_tpu_files", lambda folder: True)
    for named, expected in (("cpu", False), ("cuda", False), ("tpu,cpu", True), ("", True)):
        monkeypatch.setenv("JAX_PLATFORMS", named)
        assert may_have_tpu() == expected


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
    assert may_have_tpu() == (libtpu and chips)


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


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("XLA_FLAGS", "--xla_no_such=1", "XLA refuses XLA_FLAGS --xla_no_such=1 (Unknown flag"),
        ("XLA_FLAGS", "--xla_force_host_platform_device_count=many", "LIBTPU_INIT_ARGS"),
        (
            "JAX_DISABLE_JIT",
            "True",
            "JAX_DISABLE_JIT is set",
        ),
    ],
)
def test_variables_under_which_nothing_compiles_are_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str
) -> None:
    monkeypatch.setenv(name, value)
    with refusal(UnfitEnvironmentError, words):
        refuse_unfit_environment()


def test_other_variables_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "  --xla_force_host_platform_device_count=2 ")
    monkeypatch.setenv("JAX_DISABLE_JIT", "0")
    refuse_unfit_environment()
