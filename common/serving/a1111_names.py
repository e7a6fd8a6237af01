"""What AUTOMATIC1111's web UI calls samplers and schedulers, and which settings of ours they are.

Since its version 1.9 they are two names, `DPM++ 2M` and `Karras`; before, one, `DPM++ 2M Karras`.
`Automatic` is the scheduler that the web UI has for a sampler. diffusers' own names of the
schedulers: https://huggingface.co/docs/diffusers/api/schedulers/overview.
"""

from dataclasses import dataclass
from typing import Any

from common.errors import BadSettingError, shorten
from common.sampling.schedulers import KARRAS, SCHEDULERS, Scheduler

MOST_NAMED = 60  # characters of what is refused
AUTOMATIC = "automatic"
EXPONENTIAL, BETA = {"use_exponential_sigmas": True}, {"use_beta_sigmas": True}


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Which noise levels a sampler goes through."""

    name: str
    label: str
    options: dict[str, Any]  # of diffusers' schedulers


_SCHEDULES = (
    Schedule(name=AUTOMATIC, label="Automatic", options={}),
    Schedule(name="uniform", label="Uniform", options={"timestep_spacing": "linspace"}),
    Schedule(name="karras", label="Karras", options=KARRAS),
    Schedule(name="exponential", label="Exponential", options=EXPONENTIAL),
    Schedule(name="sgm_uniform", label="SGM Uniform", options={"timestep_spacing": "trailing"}),
    Schedule(name="simple", label="Simple", options={"timestep_spacing": "trailing"}),
    Schedule(name="beta", label="Beta", options=BETA),
)
SCHEDULES: dict[str, Schedule] = {row.name: row for row in _SCHEDULES}
# Where a sampler has no name of its own for Karras's noise levels, it takes them as an option.
SAMPLERS: dict[str, Scheduler] = {
    row.web_ui: row for row in SCHEDULERS.values() if not KARRAS.items() <= row.options.items()
}
# What the web UI takes for Automatic, where that is not the sampler's plain form.
OWN_SCHEDULES = {
    "DPM++ 2M": "karras",
    "DPM++ SDE": "karras",
    "DPM++ 2M SDE": "exponential",
    "DPM2": "karras",
    "DPM2 a": "karras",
}
# Classes that know no other noise levels; and those that have no spacing to choose either.
_ONLY_SPACED = (
    *("EulerAncestralDiscreteScheduler", "DDIMScheduler", "DDPMScheduler", "PNDMScheduler"),
    *("LCMScheduler", "TCDScheduler"),
)
_NEVER_SPACED = ("DPMSolverSinglestepScheduler", "EDMEulerScheduler")
_ONLY_THEIR_OWN = ("EDMEulerScheduler",)
# Classes whose noise eta scales here; and those which have as much noise as eta 1 gives.
_WITH_ETA = ("DDIMScheduler", "TCDScheduler")
_ETA_OF_ONE = (
    *("EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler"),
    "DPMSolverSDEScheduler",
)


def schedules_of(sampler: Scheduler) -> list[Schedule]:
    """The schedules that a sampler takes."""
    return [row for row in SCHEDULES.values() if _takes(sampler, row)]


def sampler_flags(
    sampler: str, schedule: str | None = None, eta: float | None = None
) -> dict[str, Any]:
    """As `run_all.sh` takes them.

    Args:
        sampler: by the web UI's name, alone or with the schedule behind it, or by ours.
        schedule: by its name or label.

    Raises:
        BadSettingError: there is no such name, or they do not go together.
    """
    row, asked = _split(sampler)
    chosen = asked or _schedule_called(schedule or AUTOMATIC)
    if chosen is None:
        raise BadSettingError(
            f"scheduler {shorten(str(schedule), MOST_NAMED)!r} is not known: take one of "
            f"{', '.join(SCHEDULES)}"
        )
    if not _takes(row, chosen):
        raise BadSettingError(
            f"scheduler {chosen.label} does not go with the sampler {row.web_ui}: take one of "
            f"{', '.join(each.label for each in schedules_of(row))}"
        )
    if chosen.name == AUTOMATIC:
        chosen = SCHEDULES[OWN_SCHEDULES.get(row.web_ui, AUTOMATIC)]
    options = [f"{name}={str(value).lower()}" for name, value in chosen.options.items()]
    return {"scheduler": row.name, "scheduler_option": options, "eta": _eta_of(row, eta)}


def _eta_of(row: Scheduler, eta: float | None) -> float:
    """The flag's value; other samplers have no such noise, and the web UI drops it as well."""
    if row.class_name in _WITH_ETA:
        return eta or 0.0
    has_noise = row.class_name in _ETA_OF_ONE or "algorithm_type" in row.options
    if has_noise and eta not in (None, 1):
        raise BadSettingError(f"eta {eta}: {row.web_ui} has that of 1 alone: leave it out")
    return 0.0


def _split(name: str) -> tuple[Scheduler, Schedule | None]:
    by_name = {row.web_ui.lower(): row for row in SAMPLERS.values()}
    by_name |= {row.name: row for row in SAMPLERS.values()}
    asked = name.lower()
    if asked in by_name:
        return by_name[asked], None
    for schedule in SCHEDULES.values():
        for ending in (schedule.label, schedule.name):
            sampler = asked.removesuffix(f" {ending.lower()}")
            if sampler != asked and sampler in by_name:
                return by_name[sampler], schedule
    raise BadSettingError(
        f"sampler_name {shorten(name, MOST_NAMED)!r} is not known: take one of "
        f"{', '.join(SAMPLERS)}"
    )


def _schedule_called(name: str) -> Schedule | None:
    asked = name.lower()
    return next((row for row in _SCHEDULES if asked in (row.name, row.label.lower())), None)


def _takes(sampler: Scheduler, schedule: Schedule) -> bool:
    if not schedule.options:
        return True
    if "timestep_spacing" in schedule.options:
        return sampler.class_name not in _NEVER_SPACED
    return sampler.class_name not in (*_ONLY_SPACED, *_ONLY_THEIR_OWN)
