"""Every scheduler, on tiny checkpoints of each family, equals diffusers' own pipeline.

`make parity` runs all of it and writes what was measured into docs/parity.md.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import BadSettingError, NotFiniteError
from common.runs.generation import GenerationConfig
from common.sampling.sampler import REFUSALS
from common.sampling.schedulers import SCHEDULERS
from tests.conftest import LONG
from tests.in_process import (
    Ours,
    load_pipeline,
    make_config,
    pixel_difference,
    relative_difference,
    run_pipeline,
)
from tests.parity.parity_table import ParityTable
from tests.tiny_checkpoints import save_sd, save_sdxl

FAMILIES: dict[str, Callable[[Path], Path]] = {
    "SDXL": save_sdxl,
    "SD 2 epsilon": save_sd,
    "SD 2 v_prediction": functools.partial(save_sd, prediction_type="v_prediction"),
}
VARIATIONS: dict[str, dict[str, Any]] = {
    **{f"{n} steps": {"num_inference_steps": n} for n in (1, 4, 25, 50)},
    **{
        f"{kind} sigmas": {"scheduler_options": {f"use_{kind}_sigmas": True}}
        for kind in ("karras", "exponential", "beta")
    },
    **{
        spacing: {"scheduler_options": {"timestep_spacing": spacing}}
        for spacing in ("leading", "trailing", "linspace")
    },
    "zero terminal SNR": {"scheduler_options": {"rescale_betas_zero_snr": True}},
}
FEW = dict(num_inference_steps=4, guidance_scale=2.0)
# One name for each class: the others differ by an option that is among the variations.
CLASSES = {row.class_name: name for name, row in reversed(SCHEDULERS.items())}


class Family:
    """One checkpoint with both implementations loaded once: a scheduler is only data to ours."""

    def __init__(self, model: Path) -> None:
        self.model = model
        self.pipeline = load_pipeline(model)
        self.ours = Ours(model)

    def compare(self, *, decoded: bool = True, **settings: Any) -> "Comparison":
        """Make the same two pictures by both; `decoded` compares the pictures as well."""
        defaults: dict[str, Any] = dict(height=64, width=64, num_inference_steps=12, batch=2)
        config = make_config(self.model, **{**defaults, **settings})
        try:
            expected, pictures = run_pipeline(self.pipeline, config)
        except REFUSALS as error:
            with pytest.raises(BadSettingError):
                self.ours.denoise(config)
            return Comparison(verdict=f"diffusers: {type(error).__name__}")
        try:
            latents = self.ours.denoise(config)
        except NotFiniteError:
            latents = np.full_like(expected, np.nan)
        if not np.isfinite(expected).all():
            assert not np.isfinite(latents).all()
            return Comparison(verdict="not finite")
        return Comparison(
            config=config,
            latents=relative_difference(latents, expected),
            pixels=pixel_difference(self.ours.decode(latents), pictures) if decoded else None,
        )


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How far the two are apart, or what diffusers itself says."""

    verdict: str | None = None
    config: GenerationConfig | None = None
    latents: float = 0.0
    pixels: int | None = None

    def check(self) -> None:
        assert self.latents < 1e-4
        assert self.pixels is None or self.pixels <= 2

    def __str__(self) -> str:
        pixels = "" if self.pixels is None else f", {self.pixels}"
        return self.verdict or f"{self.latents:.0e}{pixels}"


@pytest.fixture(
    scope="module",
    params=[
        "SDXL",
        pytest.param("SD 2 epsilon", marks=LONG),
        pytest.param("SD 2 v_prediction", marks=pytest.mark.slow),
    ],
)
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Family]]:
    name = request.param
    yield name, Family(FAMILIES[name](tmp_path_factory.mktemp("tiny") / "model"))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_equals_diffusers(
    family: tuple[str, Family], scheduler: str, parity_table: ParityTable
) -> None:
    name, models = family
    comparison = models.compare(scheduler=scheduler)
    parity_table.add("12 steps", scheduler, name, str(comparison))
    comparison.check()


@pytest.mark.slow
@pytest.mark.parametrize("variation", VARIATIONS)
@pytest.mark.parametrize("scheduler", CLASSES.values())
def test_every_variation_equals_diffusers(
    family: tuple[str, Family], scheduler: str, variation: str, parity_table: ParityTable
) -> None:
    name, models = family
    settings = VARIATIONS[variation]
    if not has_option(scheduler, settings.get("scheduler_options", {})):
        parity_table.add(name, scheduler, variation, "–")
        pytest.skip("diffusers' class has no such setting")
    comparison = models.compare(decoded=False, scheduler=scheduler, **settings)
    parity_table.add(name, scheduler, variation, str(comparison))
    comparison.check()


BETA_SIGMAS = {"num_inference_steps": 50, "scheduler_options": {"use_beta_sigmas": True}}


def has_option(scheduler: str, options: dict[str, Any]) -> bool:
    """Whether diffusers' class of a scheduler has settings of these names."""
    import inspect

    import diffusers

    scheduler_class = getattr(diffusers, SCHEDULERS[scheduler].class_name)
    return options.keys() <= inspect.signature(scheduler_class.__init__).parameters.keys()


@pytest.mark.parametrize(
    ("scheduler", "settings"),
    [
        *(
            pytest.param(name, BETA_SIGMAS, marks=() if name in ("dpmpp_2m", "unipc") else LONG)
            for name in ("dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2s", "unipc", "deis", "sa_solver")
        ),
        pytest.param("dpmpp_2m", BETA_SIGMAS | {"num_inference_steps": 100}, marks=LONG),
        ("euler", dict(num_inference_steps=None, timesteps=[999, 999, 500, 100])),
    ],
)
def test_a_first_timestep_twice_equals_diffusers_sdxl(
    family: tuple[str, Family], scheduler: str, settings: dict[str, Any]
) -> None:
    name, models = family
    if name == "SDXL":
        comparison = models.compare(decoded=False, scheduler=scheduler, **settings)
        assert comparison.verdict is None
        comparison.check()
        return
    # diffusers' SD pipeline looks the first step up, finds the second, and runs out of sigmas.
    config = make_config(models.model, height=64, width=64, scheduler=scheduler, **settings)
    with pytest.raises(REFUSALS):
        run_pipeline(models.pipeline, config)
    assert np.isfinite(models.ours.denoise(config)).all()


@pytest.mark.parametrize(
    "settings",
    [
        # Few steps and little guidance: clipping makes random weights' pictures chaotic, and
        # rounding alone would part two runs of diffusers itself.
        dict(scheduler="ddim", scheduler_options={"clip_sample": True}, **FEW),
        dict(scheduler="ddpm", scheduler_options={"clip_sample": True}, **FEW),
        dict(scheduler="dpmpp_2m", scheduler_options={"thresholding": True}, **FEW),
        dict(scheduler="ddim", eta=0.6),
        dict(scheduler="tcd", eta=0.3),
        dict(scheduler="euler", timesteps=[999, 800, 500, 100]),
        dict(scheduler="euler", sigmas=[14.6, 4.0, 1.0, 0.2, 0.0]),
        dict(guidance_rescale=0.7),
        dict(num_images_per_prompt=2, scheduler="dpmpp_sde", num_inference_steps=5),
    ],
    ids=str,
)
def test_settings_equal_diffusers(family: tuple[str, Family], settings: dict[str, Any]) -> None:
    if "timesteps" in settings or "sigmas" in settings:
        settings = {"num_inference_steps": None, **settings}
    comparison = family[1].compare(**settings)
    assert comparison.verdict is None
    comparison.check()


def test_one_program_serves_every_scheduler_step_count_and_guidance(
    tmp_path: Path, compilations: list[str]
) -> None:
    model = save_sdxl(tmp_path / "model")
    ours = Ours(model)
    names = ("euler", "euler_a", "heun", "dpmpp_2m_karras", "unipc", "pndm")
    for scheduler, steps, guidance in zip(
        names, (4, 50, 30, 25, 50, 7), (3, 5, 6, 7, 8, 9), strict=True
    ):
        ours.denoise(
            make_config(
                model,
                height=64,
                width=64,
                scheduler=scheduler,
                num_inference_steps=steps,
                guidance_scale=guidance,
                guidance_rescale=0.1 * (guidance % 3),
            )
        )
    assert [name for name in compilations if "denoise" in name] == ["jit(denoise_guided)"]
    assert (ours.programs.compiled, ours.programs.from_cache) == (1, 0)


@pytest.fixture
def compilations(no_compile_cache: None) -> Iterator[list[str]]:
    """The names of the programs that XLA compiles from now on, by jax's own events."""
    import jax

    names: list[str] = []

    def listen(event: str, _: float, **facts: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(str(facts.get("fun_name")))

    assert not jax.config.jax_compilation_cache_dir
    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)
