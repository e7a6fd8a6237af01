"""How a stage computes, as flags say it."""

from pathlib import Path
from typing import Any

import pytest

from common.compute.options import API_KEY, RunOptions, read_run_options
from common.errors import BadSettingError


def test_flags_that_are_not_given_leave_the_defaults() -> None:
    parameters = {"mesh": None, "batch_size": None, "profile": None, "prompt": "no option"}
    assert read_run_options(parameters) == RunOptions()
    assert RunOptions().given() == []
    options = read_run_options({"mesh": "rows=2", "repeat": 0, "no_verify": True})
    assert options.given() == ["mesh", "no_verify"]


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"batch_size": 0}, "--batch_size 0"),
        ({"repeat": -1}, "--repeat -1"),
        ({"backend": "numpy"}, "--backend 'numpy'"),
        ({"profile_steps": "5"}, "give the first step and the one after the last, as 5:8"),
        ({"profile_steps": "8:5"}, "--profile_steps '8:5'"),
        ({"remote_vae": "localhost:8000"}, "--remote_vae 'localhost:8000': give an address"),
        ({"remote_vae": "file:///etc/x"}, "--remote_vae 'file:///etc/x': give an address"),
        ({"remote_vae": "http://a:b@host"}, f"a key goes by {API_KEY}"),
        ({"remote_vae": "http://host/?x=1"}, "give the address alone"),
        ({"remote_vae": "http://[::1"}, "--remote_vae 'http://"),
    ],
)
def test_a_bad_value_names_its_flag(parameters: dict[str, Any], words: str) -> None:
    with pytest.raises(BadSettingError, match=words):
        read_run_options(parameters)


@pytest.mark.parametrize(
    ("asked", "evaluations", "expected"),
    [(None, 1, [0]), (None, 4, [2, 3]), (None, 30, [2, 3, 4]), ("5:8", 8, [5, 6, 7])],
)
def test_the_steps_of_a_profile(asked: str | None, evaluations: int, expected: list[int]) -> None:
    options = read_run_options({"profile_steps": asked})
    assert options.profile == (asked is not None)
    assert list(options.profiled_steps(evaluations)) == expected


def test_steps_that_a_run_does_not_have() -> None:
    with pytest.raises(BadSettingError, match="--profile_steps 5:8: the run has 7 steps, 0 to 6"):
        read_run_options({"profile_steps": "5:8"}).profiled_steps(7)


def test_a_place_for_a_profile_asks_for_one(tmp_path: Path) -> None:
    options = read_run_options({"profile_dir": str(tmp_path)})
    assert options.profile and options.why_measure() == "it is to be profiled"
    assert options.profile_folder(Path("run"), 3) == tmp_path / "stage3"
    assert RunOptions(profile=True).profile_folder(Path("run"), 2) == Path("run/profile/stage2")
    assert RunOptions(repeat=1).why_measure() == "it is to be repeated"
    assert RunOptions().why_measure() is None


def test_which_process_writes() -> None:
    assert RunOptions().writes()
    assert RunOptions(distributed="host:1,2,0").writes()
    assert not RunOptions(distributed="host:1,2,1").writes()
    assert not RunOptions(distributed="auto").writes()  # not known before jax says so


def test_what_an_images_bits_depend_on() -> None:
    facts = {"backend": "jax", "mesh": "single"}
    own = {"batch_size": 2, "fill_groups": True}
    by_jax = {"backend": "jax", "mesh": "single", "operations": "fast"}
    assert RunOptions().made_by(facts, 2) == by_jax | own
    assert RunOptions().made_by({"backend": "torch"}, 2) == {"backend": "torch"} | own
    elsewhere = RunOptions.model_validate({"remote_vae": "http://host:8000/"})
    address = {"remote_vae": "http://host:8000"}
    assert elsewhere.made_by({"backend": "remote"}, 2) == address | own
