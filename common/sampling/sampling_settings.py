"""How images are sampled: steps, guidance, seeds, scheduler."""

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self

from pydantic import Field, field_validator, model_validator

from common.declared import LATENTS, MODEL, SAMPLING, DeviceDtype, Place, Settings, setting
from common.errors import BadSettingError
from common.sampling.schedulers import SCHEDULER_CLASSES, SCHEDULERS
from common.text_files import parse_yaml

MOST_STEPS = 10_000  # so that a wrong number is refused before it takes memory
# Each of them says how many steps there are: giving one takes the place of the others.
STEP_SETTINGS = ("num_inference_steps", "timesteps", "sigmas")


class SamplingSettings(Settings):
    """Steps, guidance, seed and scheduler of a run, and the UNet's dtype."""

    num_inference_steps: int | None = setting(  # None: by timesteps or sigmas
        25,
        "Denoising steps.",
        metavar="N",
        group=SAMPLING,
        shapes=(LATENTS,),
        of_prompts=True,
        web_ui="Steps",
        ge=1,
        le=MOST_STEPS,
    )
    timesteps: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...] | None = setting(
        None,
        "The timesteps themselves, 999,749,….",
        metavar="N,…",
        group=SAMPLING,
        shapes=(LATENTS,),
        of_prompts=True,
        kind=str,
        shown="",
        min_length=1,
        max_length=MOST_STEPS,
    )
    sigmas: tuple[float, ...] | None = setting(
        None,
        "The sigmas themselves, 14.6,…,0.",
        metavar="X,…",
        group=SAMPLING,
        shapes=(LATENTS,),
        of_prompts=True,
        kind=str,
        shown="",
        min_length=1,
        max_length=MOST_STEPS,
    )
    # Latents of another run to begin with in place of noise: its folder, or the file. Recipes hold
    # their content.
    init_latents: Place | None = setting(
        None,
        "A run's latents to begin with.",
        metavar="RUN",
        group=SAMPLING,
        shapes=(LATENTS,),
        recorded=False,
        shown="",
    )
    upscale: float | None = setting(  # for a second pass, the "hires fix"
        None,
        "Enlarge them so many times.",
        metavar="X",
        group=SAMPLING,
        shapes=(LATENTS,),
        shown="",
        gt=1,
        le=8,
    )
    strength: float | None = setting(  # None: as diffusers' pipelines, see `strength_of`
        None,
        "Noise on it, 0 to 1.",
        metavar="X",
        group=SAMPLING,
        shapes=(LATENTS,),
        of_prompts=True,
        shown="diffusers'",
        web_ui="Denoising strength",
        ge=0,
        le=1,
    )
    denoising_start: float | None = setting(
        None,
        "Go on from this share of time.",
        metavar="X",
        group=SAMPLING,
        shapes=(LATENTS,),
        shown="",
        gt=0,
        lt=1,
    )
    denoising_end: float | None = setting(
        None,
        "Stop at this share of time.",
        metavar="X",
        group=SAMPLING,
        shapes=(LATENTS,),
        shown="",
        gt=0,
        lt=1,
    )
    guidance_scale: float = setting(
        7.5,
        "Guidance; 1 or less is none.",
        metavar="X",
        group=SAMPLING,
        shapes=(LATENTS,),
        of_prompts=True,
        web_ui="CFG scale",
        ge=0,
    )
    guidance_rescale: float = setting(
        0.0,
        "As in diffusers, 0 to 1.",
        metavar="X",
        group=SAMPLING,
        shapes=(LATENTS,),
        of_prompts=True,
        ge=0,
        le=1,
    )
    # Shares of the model evaluations: guided from the first to before the second.
    guidance_start: float = setting(
        0.0,
        "Guided from this share of steps.",
        metavar="X",
        group=SAMPLING,
        shapes=(LATENTS,),
        of_prompts=True,
        ge=0,
        le=1,
    )
    guidance_end: float = setting(
        1.0,
        "Guided up to this share of steps.",
        metavar="X",
        group=SAMPLING,
        shapes=(LATENTS,),
        of_prompts=True,
        ge=0,
        le=1,
    )
    seed: int = setting(  # recipes hold each image's own
        42,
        "Seed of the first picture.",
        metavar="N",
        group=SAMPLING,
        shapes=(LATENTS,),
        recorded=False,
        web_ui="Seed",
        ge=0,
        lt=2**63,
    )
    same_seed: bool = setting(  # recipes hold each image's own
        False,
        "Every prompt with the run's seed.",
        metavar=" ",
        group=SAMPLING,
        shapes=(LATENTS,),
        recorded=False,
        shown="",
    )
    seed_offset: int = setting(  # likewise
        0,
        "Added to all seeds.",
        metavar="N",
        group=SAMPLING,
        shapes=(LATENTS,),
        recorded=False,
        gt=-(2**63),
        lt=2**63,
    )
    scheduler: str | None = setting(  # None: the checkpoint's own; recipes hold the class
        None,
        "euler_a, unipc, …",
        metavar="NAME",
        group=SAMPLING,
        shapes=(LATENTS,),
        of_prompts=True,
        recorded=False,
        web_ui="Sampler",
        shown="checkpoint's own",
    )
    scheduler_options: dict[str, Any] = setting(
        {},
        "A setting of the scheduler's own.",
        metavar="K=V",
        group=SAMPLING,
        shapes=(LATENTS,),
        of_prompts=True,
        recorded=False,
        many=True,
        flag="scheduler_option",
        shown="",
    )
    eta: float = setting(  # as diffusers' pipelines hand it on
        0.0,
        "Noise of DDIM and TCD, 0 to 1.",
        metavar="X",
        group=SAMPLING,
        shapes=(LATENTS,),
        of_prompts=True,
        ge=0,
    )
    unet_dtype: DeviceDtype = setting(  # bfloat16 on TPU and GPU, float32 on CPU
        "auto",
        "float32, bfloat16, auto.",
        metavar="DTYPE",
        group=MODEL,
        shapes=(LATENTS,),
        recorded=False,
    )

    @field_validator("scheduler")
    @classmethod
    def _known_scheduler(cls, name: str | None) -> str | None:
        if name is None or name in SCHEDULERS or name in SCHEDULER_CLASSES:
            return name
        near = difflib.get_close_matches(name, [*SCHEDULERS, *SCHEDULER_CLASSES], n=1, cutoff=0)
        raise ValueError(
            f"did you mean {near[0]!r}? There are {', '.join(SCHEDULERS)}, and their diffusers "
            "class names"
        )

    @field_validator("timesteps", "sigmas", mode="before")
    @classmethod
    def _steps_in_a_flag(cls, value: Any) -> Any:
        return value.split(",") if isinstance(value, str) else value

    @field_validator("scheduler_options")
    @classmethod
    def _options_fit_into_json(cls, options: dict[str, Any]) -> dict[str, Any]:
        try:
            json.dumps(options, allow_nan=False, ensure_ascii=False).encode()
        except (TypeError, ValueError, RecursionError):
            raise ValueError("give finite numbers, words, true, false or null") from None
        return options

    @model_validator(mode="after")
    def _guidance_starts_before_it_ends(self) -> Self:
        if self.guidance_start > self.guidance_end:
            raise ValueError(
                f"guidance_start {self.guidance_start} is after guidance_end {self.guidance_end}"
            )
        return self

    @model_validator(mode="after")
    def _parts_go_together(self) -> Self:
        if self.upscale is not None and self.init_latents is None:
            raise ValueError("upscale is for latents to begin with: give init_latents")
        if self.upscale is not None and self.denoising_start is not None:
            raise ValueError(
                "denoising_start goes on with the noise that latents have, which upscale spoils: "
                "give strength in its place"
            )
        if self.denoising_start is not None and self.init_latents is None:
            raise ValueError(
                "denoising_start goes on from latents with noise in them: give init_latents"
            )
        if self.denoising_start is not None and self.strength is not None:
            raise ValueError(
                "denoising_start goes on without new noise: leave strength out, or denoising_start"
            )
        start, end = self.denoising_start or 0, self.denoising_end or 1
        if start >= end:
            raise ValueError(f"denoising_start {start} is not before denoising_end {end}")
        return self

    @model_validator(mode="after")
    def _one_way_to_say_the_steps(self) -> Self:
        given = [name for name in STEP_SETTINGS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(STEP_SETTINGS)}, not {len(given)} of them")
        return self

    def steps(self) -> dict[str, Any]:
        """The number of steps, or the timesteps or sigmas in its place; None for the others."""
        return {name: getattr(self, name) for name in STEP_SETTINGS}


def merge_settings(
    lower: Mapping[str, Any], upper: Mapping[str, Any], source: str
) -> dict[str, Any]:
    """Lay settings over others, those that exclude or belong to each other together.

    A way of giving the steps (`STEP_SETTINGS`) takes the place of another way; another scheduler
    takes its predecessor's options away, options alone are added to those before.

    Raises:
        BadSettingError: `upper` gives the steps in two ways; names `source`.
    """
    given = [name for name in STEP_SETTINGS if upper.get(name) is not None]
    if len(given) > 1:
        raise BadSettingError(f"{source}: give either {' or '.join(given)}, not both")
    merged = {**lower, **upper}
    if given:
        merged |= {name: None for name in STEP_SETTINGS if name != given[0]}
    if upper.get("scheduler", lower.get("scheduler")) != lower.get("scheduler"):
        merged["scheduler_options"] = upper.get("scheduler_options", {})
    elif isinstance(upper.get("scheduler_options"), dict):
        before = lower.get("scheduler_options", {})
        merged["scheduler_options"] = {**before, **upper["scheduler_options"]}
    return merged


def _parse_value(text: str) -> Any:
    """A value as YAML writes it; 1e-2 is a number as well."""
    value = parse_yaml(text)
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def parse_scheduler_options(items: Sequence[str]) -> dict[str, Any]:
    """Read `key=value` flags, with each value as YAML writes it.

    Raises:
        BadSettingError: an item is not of this form.
    """
    options = {}
    for item in items:
        key, equals, text = item.partition("=")
        try:
            if not equals or not key:
                raise ValueError("no =")
            options[key.replace("-", "_")] = _parse_value(text)
        except ValueError:
            raise BadSettingError(
                f"--scheduler_option {item}: give key=value, such as use_karras_sigmas=true"
            ) from None
    return options
