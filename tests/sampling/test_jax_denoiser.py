"""The compiled program gives diffusers' latents on every mesh; only shapes are compiled in."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from common.compute.clock import StageReport
from common.compute.devices import Devices
from common.compute.options import RunOptions
from common.conditions.prompt_condition import PromptCondition
from common.conditions.sizes import SizeCondition
from common.models.checkpoint import Checkpoint
from common.sampling.jax_denoiser import JaxDenoiser, Programs, denoise_step, prepare_model
from common.sampling.job import DenoisingJob
from common.sampling.loading import load_jax_denoiser
from common.sampling.share import Share
from tests.conftest import LONG
from tests.sampling.tiny_unet import (
    ROUNDING,
    denoise_by_diffusers,
    make_job,
    relative_difference,
    run,
    start,
    to_load,
)


def load(
    checkpoint: Checkpoint, job: DenoisingJob, programs: Programs | None = None, **options: Any
) -> JaxDenoiser:
    own: Programs = {} if programs is None else programs
    given = RunOptions(**({"mesh": "single"} | options))
    unet, devices = to_load(checkpoint), Devices.present()
    return load_jax_denoiser(unet, [job], given, StageReport(2), devices, own)


@pytest.mark.parametrize(
    "options",
    [{}, {"steps_per_call": 3}, pytest.param({"mesh": "data=2,cfg=2,rows=2"}, marks=LONG)],
    ids=str,
)
def test_latents_are_those_of_diffusers(checkpoint: Checkpoint, options: dict[str, Any]) -> None:
    """Images of two prompts, guided in a part of the steps."""
    job = make_job(prompts=2, images_per_prompt=1, start=0.3, end=0.8)
    found = run(load(checkpoint, job, **options), job)
    for index in range(2):
        expected = denoise_by_diffusers(checkpoint, job, index)
        assert relative_difference(found[index], expected) < ROUNDING


def test_guidance_1_is_the_conditional_prediction(checkpoint: Checkpoint) -> None:
    job = make_job(scale=1.0)
    denoiser = load(checkpoint, job)
    found = run(denoiser, job)
    for index in range(2):
        expected = denoise_by_diffusers(checkpoint, job, index)
        assert relative_difference(found[index], expected) < ROUNDING
    assert [each.name for each in denoiser.report.programs.each] == ["denoise_conditional"]


def test_an_image_of_a_batch_is_the_image_alone(checkpoint: Checkpoint) -> None:
    job = make_job(images_per_prompt=3, scheduler="euler_a")
    together = run(load(checkpoint, job), job)
    programs: Programs = {}
    for index in range(3):
        alone = make_job(images_per_prompt=1, scheduler="euler_a")
        alone.seeds[:] = [job.seeds[index]]
        found = run(load(checkpoint, alone, programs), alone)
        assert relative_difference(found[0], together[index]) < ROUNDING


def test_no_value_is_compiled_in(checkpoint: Checkpoint) -> None:
    """Seeds, prompts, sizes, scheduler, steps, guidance and its interval are arguments."""
    programs: Programs = {}
    first = make_job(start=0.5)
    run(load(checkpoint, first, programs), first)
    assert len(programs) == 2
    jobs = [
        make_job(seed=9, scheduler="heun", steps=7, scale=9.0, rescale=0.4, end=0.2),
        make_job(seed=1, scheduler="euler_a", steps=2, scale=2.0),
        make_job(seed=2, scale=1.0),
    ]
    sizes = {name: [96, 32, 1, 2, 16, 8] for name in ("time_ids", "negative_time_ids")}
    for job in jobs:
        object.__setattr__(job, "conditions", (PromptCondition(), SizeCondition(sizes)))
        denoiser = load(checkpoint, job, programs)
        assert np.isfinite(run(denoiser, job)).all()
        assert denoiser.report.programs.each == []


def test_what_is_compiled_in_has_programs_of_its_own(checkpoint: Checkpoint) -> None:
    programs: Programs = {}

    def names(job: DenoisingJob, **options: Any) -> list[str]:
        denoiser = load(checkpoint, job, programs, **options)
        start(denoiser, job)
        return [each.name for each in denoiser.report.programs.each]

    assert names(make_job(start=0.5)) == ["denoise_conditional", "denoise_guided"]
    assert names(make_job(images_per_prompt=1)) == ["denoise_guided"]
    assert names(make_job(shape=(4, 8, 16))) == ["denoise_guided"]
    assert names(make_job(), steps_per_call=2) == ["denoise_guided"]  # a loop
    assert names(make_job()) == []


def test_devices_of_the_other_half_have_work_without_guidance(checkpoint: Checkpoint) -> None:
    said = "the devices of the other half take their share of the rows"
    for mesh, guidance, expected in (
        ("cfg=2,rows=2", {"start": 0.5}, said),
        ("cfg=2,rows=2", {}, None),
        ("rows=2", {"start": 0.5}, None),
    ):
        job = make_job(**guidance)  # type: ignore[arg-type]
        denoiser = load(checkpoint, job, mesh=mesh)
        denoiser.start(Share(job, np.arange(2), None))
        assert denoiser.unguided_in_words() == expected
        assert denoiser.facts()["mesh"] == mesh


@pytest.mark.parametrize("soft", [False, True])
def test_a_step_is_the_tables_row(soft: bool) -> None:
    """x = Σ coefficients·(x₀, ε₁, …) + Σ noise_coefficients·noises, whatever predicts ε.

    Where nothing is made anew, x is the picture with the noise of the step. Soft masks keep the
    difference that this makes.
    """
    random = np.random.default_rng(0)
    shape, steps, i = (2, 4, 3, 3), 5, 2
    tensors = 1 + (2 * steps if soft else steps)
    schedule = {
        "input_scales": random.normal(size=steps),
        "timesteps": random.normal(size=steps),
        "coefficients": random.normal(size=(steps, tensors)),
        "noise_coefficients": random.normal(size=(steps, steps)),
        "kept_scales": random.normal(size=(steps, 2)),
        "free_from": random.uniform(size=steps),
    }
    noises, history = random.normal(size=(steps, *shape)), random.normal(size=(tensors, *shape))
    latents = random.normal(size=shape)

    def predict(sample: Any, timestep: Any, _: Any) -> Any:
        return jnp.tanh(sample + timestep)

    masks = random.uniform(size=(2, 1, 3, 3)).astype(np.float32)
    of_picture, of_noise = random.normal(size=(2, *shape))
    arguments = {
        "schedule": {n: jnp.asarray(a) for n, a in schedule.items()},
        "noises": noises,
        "kept": {"masks": masks, "original": of_picture, "noise": of_noise},
    }
    state = jnp.asarray(latents), jnp.asarray(history)
    found, kept = denoise_step(predict, state, arguments, jnp.int32(i))
    sample = latents * schedule["input_scales"][i]
    history[i + 1] = np.tanh(sample + schedule["timesteps"][i])
    expected = np.tensordot(schedule["coefficients"][i], history, 1)
    expected += np.tensordot(schedule["noise_coefficients"][i], noises, 1)
    stays = schedule["kept_scales"][i] @ np.stack([of_picture, of_noise]).reshape(2, -1)
    laid = np.where(masks >= schedule["free_from"][i], expected, stays.reshape(shape))
    if soft:
        history[1 + steps + i] = laid - expected
    expected = laid
    np.testing.assert_allclose(kept, history, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_float32_models_have_float32_products_everywhere() -> None:
    """Also where the prompts are projected, outside of the UNet's own call."""
    block = torch.nn.ModuleDict({"attn2": torch.nn.ModuleDict()})
    block["attn2"]["to_k"] = torch.nn.Linear(8, 4, bias=False)
    unet = torch.nn.ModuleDict({"block": block})
    parameters = {"block.attn2.to_k.weight": jnp.ones((4, 8))}
    program = jax.make_jaxpr(lambda p, x: prepare_model(unet, p, x, "fast")[1])(
        parameters, jnp.ones((1, 3, 8))
    )
    assert str(program).count("dot_general") == 1
    assert "HIGHEST" in str(program)
