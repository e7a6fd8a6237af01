"""diffusers' schedulers by their short names, and what web UIs call them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

KARRAS = {"use_karras_sigmas": True}
SDE = {"algorithm_type": "sde-dpmsolver++"}


@dataclass(frozen=True, kw_only=True)
class Scheduler:
    """A row of the table."""

    name: str
    class_name: str  # diffusers'
    web_ui: str
    options: Mapping[str, Any] = field(default_factory=dict)  # that the name stands for


def _row(name: str, class_name: str, web_ui: str, **options: Any) -> Scheduler:
    return Scheduler(name=name, class_name=class_name, web_ui=web_ui, options=options)


_ROWS = (
    _row("euler", "EulerDiscreteScheduler", "Euler"),
    _row("euler_karras", "EulerDiscreteScheduler", "Euler Karras", **KARRAS),
    _row("euler_a", "EulerAncestralDiscreteScheduler", "Euler a"),
    _row("ddim", "DDIMScheduler", "DDIM"),
    _row("ddpm", "DDPMScheduler", "DDPM"),
    _row("pndm", "PNDMScheduler", "PLMS"),
    _row("lms", "LMSDiscreteScheduler", "LMS"),
    _row("lms_karras", "LMSDiscreteScheduler", "LMS Karras", **KARRAS),
    _row("heun", "HeunDiscreteScheduler", "Heun"),
    _row("dpm2", "KDPM2DiscreteScheduler", "DPM2"),
    _row("dpm2_a", "KDPM2AncestralDiscreteScheduler", "DPM2 a"),
    _row("dpmpp_2m", "DPMSolverMultistepScheduler", "DPM++ 2M"),
    _row("dpmpp_2m_karras", "DPMSolverMultistepScheduler", "DPM++ 2M Karras", **KARRAS),
    _row("dpmpp_2m_sde", "DPMSolverMultistepScheduler", "DPM++ 2M SDE", **SDE),
    _row(
        "dpmpp_2m_sde_karras",
        "DPMSolverMultistepScheduler",
        "DPM++ 2M SDE Karras",
        **SDE,
        **KARRAS,
    ),
    _row("dpmpp_2s", "DPMSolverSinglestepScheduler", "DPM++ 2S"),
    _row("dpmpp_sde", "DPMSolverSDEScheduler", "DPM++ SDE"),
    _row("dpmpp_sde_karras", "DPMSolverSDEScheduler", "DPM++ SDE Karras", **KARRAS),
    _row("unipc", "UniPCMultistepScheduler", "UniPC"),
    _row("deis", "DEISMultistepScheduler", "DEIS"),
    _row("lcm", "LCMScheduler", "LCM"),
    _row("tcd", "TCDScheduler", "TCD"),
    _row("sa_solver", "SASolverScheduler", "SA Solver"),
    _row("edm_euler", "EDMEulerScheduler", "Euler EDM"),
)
SCHEDULERS: dict[str, Scheduler] = {row.name: row for row in _ROWS}
SCHEDULER_CLASSES = tuple(dict.fromkeys(row.class_name for row in _ROWS))


def scheduler_choice(
    name: str | None, options: Mapping[str, Any], own: str
) -> tuple[str, dict[str, Any]]:
    """diffusers' class and the settings that differ from the checkpoint's own.

    Args:
        name: a short name, a class name, or None for the checkpoint's `own` class.
        options: `--scheduler_option`; they win over those that a short name stands for.
    """
    row = SCHEDULERS.get(name or own)
    if row is None:
        return name or own, dict(options)
    return row.class_name, {**row.options, **options}


def web_ui_sampler(class_name: str, options: Mapping[str, Any]) -> str:
    """What web UIs call a scheduler; diffusers' name of its class where they have none.

    Args:
        options: its settings besides the checkpoint's own; those that no name stands for are left
            out of the label.
    """
    fitting = [
        row
        for row in SCHEDULERS.values()
        if row.class_name == class_name and row.options.items() <= options.items()
    ]
    return max(fitting, key=lambda row: len(row.options)).web_ui if fitting else class_name
