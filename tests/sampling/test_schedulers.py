"""Schedulers by their short names, and by the names that web UIs know."""

from typing import Any

import diffusers
import pytest

from common.sampling.schedulers import (
    SCHEDULER_CLASSES,
    SCHEDULERS,
    scheduler_choice,
    web_ui_sampler,
)

KARRAS, PLAIN = {"use_karras_sigmas": True}, {"use_karras_sigmas": False}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_name_stands_for_a_class_of_diffusers_and_its_settings(name: str) -> None:
    row = SCHEDULERS[name]
    scheduler = getattr(diffusers, row.class_name)(**row.options)
    assert row.options.items() <= scheduler.config.items()
    assert scheduler_choice(name, {}, "OwnScheduler") == (row.class_name, dict(row.options))


def test_names_are_told_apart() -> None:
    assert len({row.web_ui for row in SCHEDULERS.values()}) == len(SCHEDULERS)
    choices = {(row.class_name, *sorted(row.options.items())) for row in SCHEDULERS.values()}
    assert len(choices) == len(SCHEDULERS)
    assert not SCHEDULERS.keys() & set(SCHEDULER_CLASSES)


@pytest.mark.parametrize(
    ("name", "options", "choice"),
    [
        (None, {}, ("DDIMScheduler", {})),
        (None, {"eta": 1}, ("DDIMScheduler", {"eta": 1})),
        ("euler_karras", {}, ("EulerDiscreteScheduler", KARRAS)),
        ("euler_karras", PLAIN, ("EulerDiscreteScheduler", PLAIN)),
        ("HeunDiscreteScheduler", KARRAS, ("HeunDiscreteScheduler", KARRAS)),
    ],
)  # fmt: skip
def test_given_settings_win_over_those_of_a_name(
    name: str | None, options: dict[str, Any], choice: tuple[str, dict[str, Any]]
) -> None:
    assert scheduler_choice(name, options, "DDIMScheduler") == choice


@pytest.mark.parametrize(
    ("class_name", "options", "label"),
    [
        ("EulerAncestralDiscreteScheduler", {}, "Euler a"),
        ("EulerDiscreteScheduler", {}, "Euler"),
        ("DPMSolverMultistepScheduler", {}, "DPM++ 2M"),
        ("DPMSolverMultistepScheduler", KARRAS, "DPM++ 2M Karras"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "DPM++ 2M SDE"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"} | KARRAS,
         "DPM++ 2M SDE Karras"),
        ("DPMSolverSDEScheduler", {}, "DPM++ SDE"),
        ("PNDMScheduler", {}, "PLMS"),
        ("UniPCMultistepScheduler", {}, "UniPC"),
        ("KDPM2AncestralDiscreteScheduler", {}, "DPM2 a"),
        # Settings that no name stands for
        ("EulerDiscreteScheduler", {"timestep_spacing": "trailing", "x": [1]}, "Euler"),
        ("DPMSolverMultistepScheduler", KARRAS | {"solver_order": 3}, "DPM++ 2M Karras"),
        ("HeunDiscreteScheduler", KARRAS, "Heun"),
        ("IPNDMScheduler", {}, "IPNDMScheduler"),
    ],
)  # fmt: skip
def test_what_web_uis_call_a_scheduler(
    class_name: str, options: dict[str, Any], label: str
) -> None:
    assert web_ui_sampler(class_name, options) == label
