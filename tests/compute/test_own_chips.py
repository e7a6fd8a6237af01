"""Which chips a process sees: those that it is told to, and no others."""

import os
import subprocess
import sys

import pytest

from common.compute import own_chips
from common.compute.own_chips import check_shares, parse_chips, take_chips
from common.errors import BadSettingError
from tests.conftest import PROJECT_DIR
from tests.refusals import refusal

TAKE_ONE = """
import os
from common.compute.own_chips import take_chips
from common.runs.stage_run import run_script  # which takes them when so much is imported
cores = sorted(os.sched_getaffinity(0))
own = str(len(cores) - 1)
take_chips(own, "auto")
assert os.sched_getaffinity(0) == {cores[-1]}
from common.compute.jax_start import refuse_other_chips, set_up_jax
set_up_jax()
refuse_other_chips(own)
import jax, torch
assert len(jax.devices()) == 1, jax.devices()
assert torch.get_num_threads() == 1, torch.get_num_threads()
try:
    refuse_other_chips("0-1")
except Exception as error:
    assert str(error).startswith("--chips 0-1 are 2, and jax sees 1 of cpu"), error
else:
    raise AssertionError
"""


def test_numbers_and_ranges() -> None:
    assert parse_chips("0") == [0]
    assert parse_chips("4-7, 0,2-2") == [0, 2, 4, 5, 6, 7]
    for text in ("", "a", "1-", "3-1", "-1", "0,,1", "0-99999", "1024"):
        with refusal(BadSettingError, f"--chips {text} is not understood"):
            parse_chips(text)


def test_chips_are_shared_evenly() -> None:
    check_shares([])
    check_shares(["0,1", "2-3"])
    with refusal(BadSettingError, "--chips 0-1 and --chips 1,2 both name 1"):
        check_shares(["0-1", "1,2"])
    with refusal(BadSettingError, "--chips 2: give each process as many as --chips 0-1, 2"):
        check_shares(["0-1", "2"])


def test_a_process_is_bound_to_cores_of_a_cpu() -> None:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    environment.pop("OMP_NUM_THREADS", None)
    result = subprocess.run(
        [sys.executable, "-c", TAKE_ONE], cwd=PROJECT_DIR, env=environment, capture_output=True
    )
    assert result.returncode == 0, result.stderr.decode()
    with refusal(BadSettingError, "--chips 1000: this process may use", "numbered from 0"):
        take_chips("1000", "torch")


def test_a_tpu_is_opened_by_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_chips, "has_only_cpus", lambda: False)
    monkeypatch.setattr(own_chips, "may_have_tpu", lambda: True)
    monkeypatch.setattr(os, "environ", {"TPU_NAME": "own"})
    ports = set()
    for text, chips, bounds in (
        ("3", "3", "1,1,1"),
        ("2-3", "2,3", "1,2,1"),
        ("4-7", "4,5,6,7", "2,2,1"),
        ("0-7", "0,1,2,3,4,5,6,7", "2,4,1"),
    ):
        take_chips(text, "auto")
        assert os.environ["TPU_VISIBLE_CHIPS"] == chips
        assert os.environ["TPU_CHIPS_PER_PROCESS_BOUNDS"] == bounds
        assert os.environ["TPU_PROCESS_BOUNDS"] == "1,1,1" and os.environ["TPU_NAME"] == "own"
        port = os.environ["TPU_PROCESS_PORT"]
        assert os.environ["TPU_PROCESS_ADDRESSES"] == f"localhost:{port}"
        ports.add(port)
    assert len(ports) > 1
    for text in ("0-2", "0,3", "1-2", "2-5", "0-15"):
        with refusal(BadSettingError, f"--chips {text}: a TPU's chips are opened by 1, 2, 4, 8"):
            take_chips(text, "jax")


def test_a_gpu_is_one_of_those_that_the_process_may_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_chips, "has_only_cpus", lambda: False)
    monkeypatch.setattr(own_chips, "may_have_tpu", lambda: False)
    monkeypatch.setattr(os, "environ", {})
    take_chips("1,3", "auto")
    assert os.environ == {"CUDA_VISIBLE_DEVICES": "1,3"}
    os.environ["CUDA_VISIBLE_DEVICES"] = "4,GPU-5,6"
    take_chips("1-2", "auto")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-5,6"
    with refusal(BadSettingError, "--chips 2: CUDA_VISIBLE_DEVICES GPU-5,6 has 2"):
        take_chips("2", "auto")
