"""diffusers' schedulers as its pipelines make and drive them."""

from typing import Any

import pytest

from common.errors import BadSettingError
from common.sampling.sampler import Sampler, make_scheduler
from common.sampling.scheduler_tables import make_tables
from tests.tiny_checkpoints import SCHEDULER

SDXL_SETTINGS = SCHEDULER | {"timestep_spacing": "leading"}


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("EulerDiscreteScheduler", {"use_karas_sigmas": True}, "did you mean 'use_karras_sigmas'"),
        ("EulerDiscreteScheduler", {"prediction_type": "v"}, None),
        ("DPMSolverSDEScheduler", {"noise_sampler_seed": 3}, "use --seed"),
        ("NoSuchScheduler", {}, "no scheduler NoSuchScheduler"),
        ("LMSDiscreteScheduler", {"use_karras_sigmas": True, "use_beta_sigmas": True}, "Only one"),
        ("DDIMScheduler", {"beta_schedule": "cubic"}, "cubic"),
    ],
)
def test_a_bad_scheduler_setting_is_one_sentence(
    name: str, options: dict[str, Any], words: str | None
) -> None:
    with pytest.raises(BadSettingError, match=words):
        scheduler = make_scheduler(SDXL_SETTINGS, name, options)
        make_tables(Sampler(scheduler, num_inference_steps=5))
