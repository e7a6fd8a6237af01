"""Runs that begin with latents equal diffusers' image-to-image pipelines, which take them too."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from common.errors import BadSettingError
from common.runs.jobs import make_sampler
from common.sampling.sampler import REFUSALS
from common.sampling.scheduler_tables import make_tables
from common.sampling.schedulers import SCHEDULERS
from tests.conftest import LONG
from tests.in_process import (
    Ours,
    generators_of,
    load_pipeline,
    make_config,
    relative_difference,
    scheduled,
)
from tests.parity.parity_table import ParityTable
from tests.tiny_checkpoints import save_sd, save_sdxl

STRENGTHS = (0.1, 0.5, 0.9, 1.0)
# diffusers is wrong there, ours right (tests/sampling/test_step_range.py): LMS takes its order from
# its place in the schedule, PNDM loses a step. At full strength both begin whole.
DIFFERENT = ("LMSDiscreteScheduler", "PNDMScheduler")
# Ended by diffusers in the middle of a step.
TORN = ("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "DPMSolverSDEScheduler")
# Cut at whole steps, they give what the run in one gives; others look back at steps before.
WHOLE = ("euler", "euler_karras", "ddim", "heun", "dpm2")
STEPS, CUT = 12, 0.6


class Family:
    """A tiny checkpoint by both, and latents of two images."""

    def __init__(self, model: Path, folder: Path, kind: Any) -> None:
        self.model, self.file = model, folder / "latents.safetensors"
        generator = torch.Generator().manual_seed(3)
        self.latents = torch.randn((2, 4, 8, 8), generator=generator)
        save_file({"latents": self.latents}, self.file)
        self.ours, parts = Ours(model), load_pipeline(model).components
        self.pipeline = kind(**parts, **({} if "text_encoder_2" in parts else NO_CHECKER))
        self.pipeline.set_progress_bar_config(disable=True)

    def config(self, **settings: Any) -> Any:
        size = {"height": 64, "width": 64, "num_inference_steps": STEPS, "batch": 2}
        return make_config(self.model, **{"init_latents": str(self.file), **size, **settings})

    def by_diffusers(self, config: Any, base: Any = None, **options: Any) -> np.ndarray:
        """From the latents, or from noise by a pipeline `base`."""
        pipeline, begun = base or self.pipeline, {} if base else {"image": self.latents}
        with scheduled(pipeline, config):
            made = pipeline(
                prompt=[prompt.prompt for prompt in config.prompts],
                negative_prompt=[prompt.negative_prompt for prompt in config.prompts],
                num_inference_steps=STEPS,
                guidance_scale=config.guidance_scale,
                generator=generators_of(config),
                output_type="latent",
                **{**begun, **options},
            ).images
        return np.asarray(made.numpy())


NO_CHECKER = {"requires_safety_checker": False}


@pytest.fixture(scope="module", params=["SDXL", pytest.param("SD", marks=pytest.mark.slow)])
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Family]]:
    folder = tmp_path_factory.mktemp("tiny")
    if request.param == "SDXL":
        model, kind = save_sdxl(folder / "model"), diffusers.StableDiffusionXLImg2ImgPipeline
    else:
        model, kind = save_sd(folder / "model"), diffusers.StableDiffusionImg2ImgPipeline
    yield request.param, Family(model, folder, kind)


@pytest.mark.parametrize(
    "strength",
    [s if s == 0.5 else pytest.param(s, marks=pytest.mark.slow) for s in STRENGTHS],
)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_equals_diffusers(
    family: tuple[str, Family], scheduler: str, strength: float, parity_table: ParityTable
) -> None:
    name, models = family
    config = models.config(scheduler=scheduler, strength=strength)
    cell = (f"from latents, {name}", scheduler, f"strength {strength}")
    if SCHEDULERS[scheduler].class_name in DIFFERENT and strength < 1:
        found = models.ours.denoise(config)
        assert np.isfinite(found).all()
        off = relative_difference(models.by_diffusers(config, strength=strength), found)
        parity_table.add(*cell, f"diffusers is {100 * off:.1f} % off")
        return
    try:
        expected = models.by_diffusers(config, strength=strength)
    except REFUSALS as error:
        with pytest.raises(BadSettingError):
            models.ours.denoise(config)
        parity_table.add(*cell, f"diffusers: {type(error).__name__}")
        return
    difference = relative_difference(models.ours.denoise(config), expected)
    parity_table.add(*cell, f"{difference:.0e}")
    assert difference < 1e-4


@pytest.mark.parametrize(
    "scheduler", ["euler", "euler_a", "ddim", "dpmpp_2m", "dpmpp_sde", "lcm", "heun", "dpm2"]
)
def test_going_on_from_a_cut_equals_diffusers(family: tuple[str, Family], scheduler: str) -> None:
    """The second part of an ensemble of experts, which no noise is added to."""
    name, models = family
    if name == "SD":
        pytest.skip("diffusers' pipeline for SD has no denoising_start")
    config = models.config(scheduler=scheduler, denoising_start=0.6)
    expected = models.by_diffusers(config, denoising_start=0.6)
    assert relative_difference(models.ours.denoise(config), expected) < 1e-4
    if SCHEDULERS[scheduler].class_name in TORN:
        return
    config = models.config(scheduler=scheduler, denoising_start=0.3, denoising_end=0.6)
    expected = models.by_diffusers(config, denoising_start=0.3, denoising_end=0.6)
    assert relative_difference(models.ours.denoise(config), expected) < 1e-4


def test_enlarged_latents_equal_diffusers(family: tuple[str, Family]) -> None:
    """Which is given latents that are enlarged already, bilinearly."""
    _, models = family
    config = models.config(strength=0.6, upscale=1.5, height=96, width=96, scheduler="ddim")
    larger = torch.nn.functional.interpolate(models.latents, size=(12, 12), mode="bilinear")
    expected = models.by_diffusers(config, image=larger, strength=0.6)
    assert relative_difference(models.ours.denoise(config), expected) < 1e-4


@pytest.mark.parametrize("backend", ["jax", pytest.param("torch", marks=LONG)])
def test_two_runs_are_the_run_in_one(family: tuple[str, Family], backend: str) -> None:
    """Heun's and KDPM2's steps are two evaluations, which diffusers tears apart."""
    _, models = family
    ours = models.ours if backend == "jax" else Ours(models.model, backend=backend)
    for scheduler in ("euler", "heun", "dpm2"):
        settings = dict(scheduler=scheduler, init_latents=None)
        whole = ours.denoise(models.config(**settings))
        first = ours.denoise(models.config(**settings, denoising_end=0.45))
        file = models.file.with_name("between.safetensors")
        save_file({"latents": torch.from_numpy(first)}, file)
        second = models.config(scheduler=scheduler, init_latents=str(file), denoising_start=0.45)
        assert relative_difference(ours.denoise(second), whole) < 1e-5
        assert relative_difference(first, whole) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_what_a_cut_changes(
    family: tuple[str, Family], scheduler: str, parity_table: ParityTable
) -> None:
    """A run cut in two beside the run in one, by ours and by diffusers."""
    name, models = family
    if name == "SD":
        pytest.skip("diffusers' pipeline for SD has no denoising_start")
    base = diffusers.StableDiffusionXLPipeline(**models.pipeline.components)
    base.set_progress_bar_config(disable=True)
    whole = models.config(scheduler=scheduler, init_latents=None)
    file = models.file.with_name("cut.safetensors")
    second = models.config(scheduler=scheduler, init_latents=str(file), denoising_start=CUT)
    if make_tables(make_sampler(whole, models.ours.checkpoint)).noises:
        pytest.skip("its noises are drawn anew in the second run")

    section = f"SDXL, cut in two at {CUT}: how far from the run in one"
    if scheduler == "edm_euler":  # diffusers compares its timesteps with noise levels
        with pytest.raises(BadSettingError, match="denoising_start"):
            models.ours.denoise(second)
        parity_table.add(section, scheduler, "ours", "refused")
        return
    expected = models.ours.denoise(whole)
    first = models.ours.denoise(whole.model_copy(update={"denoising_end": CUT}))
    save_file({"latents": torch.from_numpy(first)}, file)
    ours = relative_difference(models.ours.denoise(second), expected)
    parity_table.add(section, scheduler, "ours", f"{100 * ours:.1g} %")
    assert ours < (1e-5 if scheduler in WHOLE else 0.01)
    try:
        in_one = models.by_diffusers(whole, base)
        cut = torch.from_numpy(models.by_diffusers(whole, base, denoising_end=CUT))
        ended = models.by_diffusers(second, image=cut, denoising_start=CUT)
        theirs = relative_difference(ended, in_one)
        parity_table.add(section, scheduler, "diffusers", f"{100 * theirs:.1g} %")
        assert ours < theirs + 1e-5
    except REFUSALS as error:
        parity_table.add(section, scheduler, "diffusers", type(error).__name__)


def test_a_scheduler_on_the_host_begins_there_too(family: tuple[str, Family]) -> None:
    _, models = family
    clipping = dict(scheduler="ddim", scheduler_options={"clip_sample": True}, guidance_scale=2.0)
    config = models.config(strength=0.4, **clipping)
    expected = models.by_diffusers(config, strength=0.4)
    assert relative_difference(models.ours.denoise(config), expected) < 1e-4
