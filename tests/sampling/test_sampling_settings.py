"""How steps and schedulers are asked for, and which of two requests wins."""

from pathlib import Path

import pytest

from common.errors import BadSettingError
from common.runs.generation import read_run_settings
from common.sampling.sampling_settings import parse_scheduler_options
from tests.configs import make_config
from tests.conftest import DEMO


def test_the_steps_are_given_in_one_way(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("timesteps: [999, 500]\n")
    settings = read_run_settings(file, {})
    assert (settings.num_inference_steps, settings.timesteps) == (None, (999, 500))
    settings = read_run_settings(file, {"num_inference_steps": 9})
    assert (settings.num_inference_steps, settings.timesteps) == (9, None)
    settings = read_run_settings(None, {"sigmas": "14.5,1,0"})
    assert (settings.num_inference_steps, settings.sigmas) == (None, (14.5, 1.0, 0.0))
    with pytest.raises(BadSettingError, match="either num_inference_steps or timesteps"):
        read_run_settings(None, {"num_inference_steps": 9, "timesteps": "1,2"})
    with pytest.raises(BadSettingError, match="--timesteps 'x'"):
        read_run_settings(None, {"timesteps": "999,x"})


def test_scheduler_options_belong_to_their_scheduler(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("scheduler: dpmpp_2m\nscheduler_options: {solver_order: 3}\n")
    added = read_run_settings(file, {"scheduler_options": {"use_karras_sigmas": True}})
    assert added.scheduler_options == {"solver_order": 3, "use_karras_sigmas": True}
    other = read_run_settings(file, {"scheduler": "euler"})
    assert other.scheduler_options == {}
    config, changes = make_config(DEMO, scheduler="lms", scheduler_options={"a": 1}).override(
        {"scheduler": "heun"}
    )
    assert config.scheduler_options == {}
    assert changes == {"scheduler": ["lms", "heun"], "scheduler_options": [{"a": 1}, {}]}


def test_scheduler_options_on_the_command_line() -> None:
    parsed = parse_scheduler_options(["use_karras_sigmas=true", "solver-order=3", "kind=a=b"])
    assert parsed == {"use_karras_sigmas": True, "solver_order": 3, "kind": "a=b"}
    for bad in ("x", "=1", "x=[1"):
        with pytest.raises(BadSettingError, match="--scheduler_option"):
            parse_scheduler_options([bad])
