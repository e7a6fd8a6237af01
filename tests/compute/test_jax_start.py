"""jax starts once in a process, alone or with others, whatever later runs ask for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from common.compute import jax_start
from common.errors import UnfitEnvironmentError
from tests.conftest import PROJECT_DIR, Run, file_contents
from tests.refusals import refusal

PROGRAM = """
import json, os, sys
from common.compute import jax_start, processes
from common.compute.platforms import usable_cores
from common.errors import StageError, UnfitEnvironmentError

def start(distributed):
    try:
        jax_start.set_up_jax(distributed)
        import jax
        return [jax.default_backend(), jax.device_count(), usable_cores()]
    except StageError as error:
        return [type(error).__name__, str(error)]

joined = []
if "joining" in sys.argv:  # as if others were there
    jax_start.join_processes = joined.append
if "failing" in sys.argv:  # as if the devices were taken at first
    jax_start.join_processes = joined.append
    find = jax_start.find_devices

    def fail():
        jax_start.find_devices = find
        raise UnfitEnvironmentError("taken")

    jax_start.find_devices = fail
if "used" in sys.argv:
    import jax
    jax.devices()
asked = json.loads(sys.argv[1])
print(json.dumps([[start(each) for each in asked], joined]))
"""


def start(*asked: str | None, how: str = "") -> tuple[list[list[object]], list[str]]:
    """What starts of jax in one new process give, one after another, and whom it joined."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(asked), how],
        capture_output=True,
        text=True,
        env=environment,
        cwd=PROJECT_DIR,
    )
    assert result.returncode == 0, result.stderr
    found, joined = json.loads(result.stdout)
    return found, joined


def test_every_core_is_a_device_from_the_first_start_on() -> None:
    (first, again, refused), _ = start(None, None, "auto")
    assert first == again == ["cpu", first[2], first[2]]
    assert refused == [
        "BadSettingError",
        "--distributed auto: jax started alone in this process, and stays so: run it in another "
        "one",
    ]


def test_a_process_joins_others_once() -> None:
    place = "localhost:1234,2,0"
    (first, again, other, alone), joined = start(place, place, "auto", None, how="joining")
    assert first == again and first[0] == "cpu"
    assert joined == [place]
    for refused, said in ((other, "--distributed auto"), (alone, "no --distributed")):
        assert refused[0] == "BadSettingError"
        assert str(refused[1]).startswith(f"{said}: jax started with --distributed {place}")


def test_a_start_that_failed_is_tried_again() -> None:
    """The others who were found stay."""
    place = "localhost:1234,2,0"
    (failed, other, again), joined = start(place, None, place, how="failing")
    assert failed == ["UnfitEnvironmentError", "taken"]
    assert str(other[1]).startswith("no --distributed: jax started with")
    assert again[0] == "cpu" and joined == [place]


def test_jax_that_was_used_before_keeps_its_devices() -> None:
    ((platform, devices, _),), _ = start(None, how="used")
    assert (platform, devices) == ("cpu", 1)


def test_a_platform_that_is_not_there(
    run_dir: Path, stage: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "rocm")
    before = file_contents(run_dir)
    result = stage(3, "--output_dir", run_dir)
    assert result.returncode == 5, result.stderr
    assert result.stderr.startswith("error: jax finds no device (Unable to initialize backend")
    assert "run on the CPU with JAX_PLATFORMS=cpu" in result.stderr
    assert result.stderr.count("\n") == 1
    assert file_contents(run_dir) == before


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError(
            f"ABORTED: The TPU is already in use by process with pid {os.getpid()}. Not "
            "attempting to load libtpu.so in this process."),
         [f"with pid {os.getpid()}", "which runs", Path(sys.executable).name, "free the device"]),
        (RuntimeError("The TPU is already in use by process with pid 4194305."), ["pid 4194305."]),
        (AssertionError(), ["JAX_PLATFORMS=cpu", "install jax for it"]),
    ],
)  # fmt: skip
def test_a_device_that_is_taken_or_not_supported(
    error: Exception, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """libtpu's own message, which names the holder; jax's for a platform without its plugin."""

    def refuse() -> None:
        raise error

    monkeypatch.setattr(jax, "devices", refuse)
    with refusal(UnfitEnvironmentError, "jax finds no device", *words):
        jax_start.find_devices()
