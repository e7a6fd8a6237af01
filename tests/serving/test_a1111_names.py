"""The web UI's names, and what diffusers' schedulers take of them."""

import inspect
from typing import Any

import diffusers
import pytest

from common.errors import BadSettingError
from common.sampling.sampling_settings import parse_scheduler_options
from common.sampling.schedulers import KARRAS, SCHEDULERS, scheduler_choice, web_ui_sampler
from common.serving.a1111_names import (
    OWN_SCHEDULES,
    SAMPLERS,
    SCHEDULES,
    sampler_flags,
    schedules_of,
)
from tests.refusals import refusal


def class_and_options(flags: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    options = parse_scheduler_options(flags["scheduler_option"])
    return scheduler_choice(flags["scheduler"], options, "none")


@pytest.mark.parametrize("label", SAMPLERS)
def test_a_sampler_has_the_schedules_that_its_class_has_settings_for(label: str) -> None:
    taken = inspect.signature(getattr(diffusers, SAMPLERS[label].class_name)).parameters
    expected = [row for row in SCHEDULES.values() if row.options.keys() <= taken.keys()]
    assert schedules_of(SAMPLERS[label]) == expected
    for schedule in expected:
        class_name, options = class_and_options(sampler_flags(label, schedule.label))
        scheduler = getattr(diffusers, class_name)(**options)
        for name, value in schedule.options.items():
            assert scheduler.config[name] == value


@pytest.mark.parametrize("row", SCHEDULERS.values(), ids=lambda row: row.name)
def test_names_of_older_clients_and_of_pictures(row: Any) -> None:
    """What a picture's metadata call a sampler is taken, and is the same one."""
    flags = sampler_flags(row.web_ui, "Uniform" if "Karras" in row.web_ui else None)
    class_name, options = class_and_options(flags)
    assert class_name == row.class_name and row.options.items() <= options.items()
    if row.web_ui not in OWN_SCHEDULES:
        assert web_ui_sampler(class_name, options) == row.web_ui


def test_either_way_of_saying_it_is_the_same() -> None:
    expected = ("DPMSolverMultistepScheduler", KARRAS)
    for sampler, schedule in (
        *(("DPM++ 2M Karras", None), ("DPM++ 2M", "karras"), ("dpm++ 2m", "Karras")),
        *(("DPM++ 2M", "automatic"), ("dpmpp_2m", None), ("DPM++ 2M karras", "Automatic")),
    ):
        assert class_and_options(sampler_flags(sampler, schedule)) == expected
    assert class_and_options(sampler_flags("Euler a", "automatic"))[1] == {}
    assert class_and_options(sampler_flags("Euler"))[1] == {}


def test_eta_counts_where_there_is_such_noise() -> None:
    assert sampler_flags("DDIM", None, 0.5)["eta"] == 0.5 and sampler_flags("DDIM")["eta"] == 0
    for name in ("Euler a", "DPM2 a", "DPM++ SDE", "DPM++ 2M SDE"):
        assert sampler_flags(name, None, 1.0) == sampler_flags(name)
        with refusal(BadSettingError, "eta 0.5", "leave it out"):
            sampler_flags(name, None, 0.5)
    assert sampler_flags("Euler", None, 0.5) == sampler_flags("Euler")


@pytest.mark.parametrize(
    ("sampler", "schedule", "said"),
    [
        ("DPM++ 3M SDE", None, "sampler_name 'DPM++ 3M SDE' is not known: take one of Euler"),
        ("", None, "sampler_name '' is not known"),
        ("Euler", "polyexponential", "scheduler 'polyexponential' is not known: take one of auto"),
        ("Euler a", "Karras", "scheduler Karras does not go with the sampler Euler a: take one"),
        ("DDIM Karras", None, "scheduler Karras does not go with the sampler DDIM"),
    ],
)
def test_names_that_are_not_known(sampler: str, schedule: str | None, said: str) -> None:
    with refusal(BadSettingError, said):
        sampler_flags(sampler, schedule)
