"""What is compiled for a TPU that is not there: its shapes and schedulers. tests/tpu compiles."""

from pathlib import Path

import jax
import pytest

from common.errors import BadInputFileError, BadSettingError
from common.files.stage_table import DENOISE
from common.runs import topology
from common.runs.flags import Given
from tests.conftest import DEMO
from tests.refusals import call, refusal


@pytest.fixture
def as_if_tpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The devices of this process stand in for a topology's, which need the compiler."""
    monkeypatch.setattr(topology, "prepare_environment", lambda: None)
    monkeypatch.setattr(topology, "devices_of", lambda _: jax.devices()[:1])


@pytest.mark.parametrize("shape", ["8,8", "0,64,64", "1x64x64", "1,-8,8"])
def test_a_shape_that_is_not_understood(as_if_tpu: None, shape: str) -> None:
    with refusal(BadSettingError, f"--pictures_shape {shape}", "N,HEIGHT,WIDTH"):
        call(3, "--topology", "v6e:1x1", "--pictures_shape", shape)


def test_a_shape_that_the_checkpoint_cannot_have(as_if_tpu: None) -> None:
    with refusal(BadSettingError, "--pictures_shape 1,100,64", "multiples of 8"):
        call(3, "--topology", "v6e:1x1", "--pictures_shape", "1,100,64")


def test_no_run_is_wanted(tmp_path: Path) -> None:
    """Whatever folder is named as the output's; one whose settings are to be read must be there."""
    for folder in (tmp_path, tmp_path / "not there"):
        given = Given(DENOISE, {"output_dir": folder, "num_inference_steps": 7})
        config, _ = topology.read_settings(given)
        assert (config.num_inference_steps, config.model_id) == (7, "models/demo")
    with refusal(BadInputFileError, "generation_config.json is missing"):
        topology.read_settings(Given(DENOISE, {"input_dir": tmp_path}))


def test_a_scheduler_that_no_program_holds(as_if_tpu: None) -> None:
    with refusal(
        BadSettingError,
        "--topology compiles schedulers that are data; DDIMScheduler steps on the host",
        "choose another --scheduler",
    ):
        call(
            *(2, "--topology", "v6e:1x1", "--model_id", DEMO, "--scheduler", "ddim"),
            *("--scheduler_option", "clip_sample=true", "--num_inference_steps", 3),
        )
