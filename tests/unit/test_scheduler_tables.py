"""Tables equal the schedulers that they were read from, on a model that is not linear."""

import sys
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from common.errors import BadSettingError
from common.scheduler_tables import BUCKET, make_tables

SDXL_SETTINGS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
    "clip_sample": False,
}
LINEAR = [
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "PNDMScheduler",
    "LMSDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
]


def build(name: str, **changes: object) -> Any:
    return getattr(diffusers, name).from_config(SDXL_SETTINGS | changes)


def nonlinear_model(x: torch.Tensor, timestep: float) -> torch.Tensor:
    weights = torch.linspace(-0.6, 0.7, 16).reshape(4, 4)
    return torch.tanh(torch.einsum("bchw,cd->bdhw", x, weights) + timestep / 1000)


def run_scheduler(scheduler: Any, steps: int, seed: int) -> torch.Tensor:
    """The reference: diffusers' own loop, with its own noises."""
    generator = torch.Generator().manual_seed(seed)
    scheduler.set_timesteps(steps)
    x = torch.randn(1, 4, 8, 8, generator=generator) * scheduler.init_noise_sigma
    takes_generator = "generator" in scheduler.step.__code__.co_varnames
    options = {"generator": generator} if takes_generator else {}
    for t in scheduler.timesteps:
        output = nonlinear_model(scheduler.scale_model_input(x, t), float(t))
        x = scheduler.step(output, t, x, return_dict=False, **options)[0]
    return x


def run_tables(scheduler: Any, steps: int, seed: int) -> torch.Tensor:
    """The same loop from the tables alone, in float64."""
    tables = make_tables(scheduler, steps)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 4, 8, 8, generator=generator) * tables.initial_noise_scale
    noises = [torch.randn(1, 4, 8, 8, generator=generator) for _ in range(tables.noises)]
    history = [x.double()]
    for i in range(tables.evaluations):
        model_input = (x * tables.input_scales[i]).float()
        history.append(nonlinear_model(model_input, float(tables.timesteps[i])).double())
        row, noise_row = tables.coefficients[i], tables.noise_coefficients[i]
        x = sum(float(row[j]) * h for j, h in enumerate(history))
        x = x + sum(float(noise_row[k]) * n for k, n in enumerate(noises))
    return x


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", LINEAR)
def test_tables_equal_the_scheduler(name: str, prediction_type: str) -> None:
    scheduler = build(name, prediction_type=prediction_type)
    expected = run_scheduler(scheduler, 12, seed=3)
    actual = run_tables(build(name, prediction_type=prediction_type), 12, seed=3)
    # float32 rounding of 12 steps; the schedulers themselves compute in float32.
    assert float((actual - expected).norm() / expected.norm()) < 2e-5


@pytest.mark.parametrize("steps", [1, 2, 25, 50, 64, 65])
def test_step_counts_are_padded_to_buckets(steps: int) -> None:
    tables = make_tables(build("EulerDiscreteScheduler"), steps)
    size = BUCKET if steps <= BUCKET else 2 * BUCKET
    assert tables.evaluations == steps
    assert tables.coefficients.shape == (size, 1 + size)
    assert tables.noise_coefficients.shape == (size, size)
    assert not tables.coefficients[steps:].any()
    for array in (tables.timesteps, tables.input_scales, tables.coefficients):
        assert array.dtype == np.float32


def test_a_scheduler_that_clips_is_refused() -> None:
    with pytest.raises(BadSettingError, match="not linear"):
        make_tables(build("DDIMScheduler", clip_sample=True), 10)


def test_a_scheduler_that_thresholds_is_refused() -> None:
    with pytest.raises(BadSettingError, match="not linear"):
        make_tables(build("DPMSolverMultistepScheduler", thresholding=True), 10)


def test_a_step_count_that_diffusers_refuses_is_one_sentence() -> None:
    with pytest.raises(BadSettingError, match="num_inference_steps 2000"):
        make_tables(build("DDIMScheduler"), 2000)


def test_probing_leaves_the_libraries_as_they_were() -> None:
    scheduler = build("EulerAncestralDiscreteScheduler")
    module = sys.modules[type(scheduler).__module__]
    before = module.randn_tensor  # type: ignore[attr-defined]
    make_tables(scheduler, 5)
    assert module.randn_tensor is before  # type: ignore[attr-defined]
