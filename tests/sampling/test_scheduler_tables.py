"""Tables equal the schedulers that they were read from, on a model that is not linear."""

import sys
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor
from hypothesis import example, given, reject, settings
from hypothesis import strategies as st

from common.errors import BadSettingError, NotFiniteError
from common.sampling.beginning import FromNoise
from common.sampling.noise import draw_all_noises, draw_first
from common.sampling.sampler import Sampler, make_scheduler
from common.sampling.scheduler_tables import BUCKET, NotLinearError, make_tables
from common.sampling.schedulers import SCHEDULERS
from common.sampling.step_range import StepRange
from tests.refusals import refusal
from tests.tiny_checkpoints import SCHEDULER

SDXL_SETTINGS = SCHEDULER | {"timestep_spacing": "leading"}
SHAPE = (4, 8, 8)


# float32 rounding; the schedulers themselves compute in float32.
ROUNDING = 2e-5


def build(name: str, *, steps: int = 12, eta: float = 0.0, **changes: object) -> Sampler:
    row = SCHEDULERS[name]
    scheduler = make_scheduler(SDXL_SETTINGS, row.class_name, {**row.options, **changes})
    return Sampler(scheduler, num_inference_steps=steps, eta=eta)


def nonlinear_model(x: torch.Tensor, timestep: float) -> torch.Tensor:
    weights = torch.linspace(-0.6, 0.7, 16).reshape(4, 4)
    return torch.tanh(torch.einsum("bchw,cd->bdhw", x, weights) + timestep / 1000)


def run_diffusers(name: str, seed: int, steps: int, eta: float, **changes: Any) -> torch.Tensor:
    """The reference: diffusers' own loop, with its own noises."""
    row = SCHEDULERS[name]
    options = {**row.options, **changes}
    if row.class_name == "DPMSolverSDEScheduler":
        options["noise_sampler_seed"] = [seed]
    scheduler = getattr(diffusers, row.class_name).from_config(SDXL_SETTINGS, **options)
    generator = torch.Generator().manual_seed(seed)
    scheduler.set_timesteps(steps)
    x = torch.randn(1, *SHAPE, generator=generator) * scheduler.init_noise_sigma
    names = scheduler.step.__code__.co_varnames[: scheduler.step.__code__.co_argcount]
    extra: dict[str, Any] = {"generator": generator} if "generator" in names else {}
    if "eta" in names:
        extra["eta"] = eta
    for t in scheduler.timesteps:
        output = nonlinear_model(scheduler.scale_model_input(x, t), float(t))
        x = scheduler.step(output, t, x, return_dict=False, **extra)[0]
    return x


def run_tables(sampler: Sampler, seed: int) -> torch.Tensor:
    """The same loop from the tables alone, in float64."""
    tables = make_tables(sampler)
    drawn = draw_first(FromNoise(), [0], [seed], sampler, SHAPE)
    x = drawn.first.latents
    noises = torch.from_numpy(draw_all_noises(drawn, [seed], sampler, tables)).double()
    history = [x.double()]
    for i in range(tables.evaluations):
        model_input = (x * tables.input_scales[i]).float()
        history.append(nonlinear_model(model_input, float(tables.timesteps[i])).double())
        row, noise_row = tables.coefficients[i], tables.noise_coefficients[i]
        x = sum(float(row[j]) * h for j, h in enumerate(history))
        x = x + sum(float(noise_row[k]) * n for k, n in enumerate(noises))
    return x


def assert_tables_equal_the_scheduler(
    name: str,
    *,
    seed: int = 3,
    steps: int = 12,
    eta: float = 0.0,
    tolerance: float = ROUNDING,
    **changes: Any,
) -> None:
    expected = run_diffusers(name, seed, steps, eta, **changes)
    sampler = build(name, steps=steps, eta=eta, **changes)
    if not expected.isfinite().all():
        with pytest.raises(NotFiniteError):
            make_tables(sampler)
        return
    actual = run_tables(sampler, seed)
    # diffusers' own loop rounds to float32 at the noise's size, which is the first step's sigma.
    tolerance = max(tolerance, 4e-7 * float(sampler.scheduler.init_noise_sigma))
    assert float((actual - expected).norm() / expected.norm()) < tolerance


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_tables_equal_the_scheduler(name: str, prediction_type: str) -> None:
    assert_tables_equal_the_scheduler(name, prediction_type=prediction_type)


@pytest.mark.parametrize("name", ["ddim", "tcd"])
def test_eta_reaches_the_schedulers_that_have_it(name: str) -> None:
    assert_tables_equal_the_scheduler(name, eta=0.7)
    plain, noisy = build(name), build(name, eta=0.7)
    assert make_tables(plain).noises == 0 < make_tables(noisy).noises


@example(  # sigmas up to 1000, of which float32 keeps 6e-5
    name="heun",
    steps=2,
    seed=0,
    changes={
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "beta_schedule": "linear",
        "beta_end": 0.02734375,
    },
)
@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(
        ["euler", "euler_a", "ddim", "pndm", "heun", "dpm2_a", "dpmpp_2m", "unipc", "sa_solver"]
    ),
    steps=st.integers(2, 40),
    seed=st.integers(0, 2**40),
    changes=st.fixed_dictionaries(
        {
            "prediction_type": st.sampled_from(["epsilon", "v_prediction"]),
            "timestep_spacing": st.sampled_from(["leading", "trailing", "linspace"]),
            "beta_schedule": st.sampled_from(["linear", "scaled_linear"]),
            "beta_end": st.floats(0.005, 0.03),
        }
    ),
)
def test_tables_equal_the_scheduler_for_any_linear_settings(
    name: str, steps: int, seed: int, changes: dict[str, Any]
) -> None:
    # Few steps divide by small sigmas, where the scheduler itself rounds; the contract is 1e-4.
    try:
        assert_tables_equal_the_scheduler(name, seed=seed, steps=steps, tolerance=1e-4, **changes)
    except NotLinearError:
        reject()  # rounds so much that it steps on the host


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(["euler", "dpmpp_2m_sde", "heun", "pndm", "lcm", "unipc"]),
    steps=st.integers(2, 30),
    weights=st.lists(st.floats(-2, 2), min_size=2, max_size=2),
)
def test_rows_superpose(name: str, steps: int, weights: list[float]) -> None:
    """What follows from a sum of histories is the sum of what follows from each."""
    tables = make_tables(build(name, steps=steps))
    width = tables.coefficients.shape[1]
    histories = np.random.default_rng(steps).normal(size=(2, width))
    histories[:, 1 + tables.evaluations :] = 0
    rows = tables.coefficients.astype(np.float64)
    combined = rows @ (weights[0] * histories[0] + weights[1] * histories[1])
    apart = weights[0] * (rows @ histories[0]) + weights[1] * (rows @ histories[1])
    np.testing.assert_allclose(combined, apart, rtol=1e-9, atol=1e-9)
    # And no row looks into the future.
    future = np.triu(np.ones_like(rows, bool), k=2)
    assert not rows[future].any()


@pytest.mark.parametrize("steps", [1, 2, 25, 50, 64, 65])
def test_step_counts_are_padded_to_buckets(steps: int) -> None:
    tables = make_tables(build("euler", steps=steps))
    size = BUCKET if steps <= BUCKET else 2 * BUCKET
    assert tables.evaluations == steps
    assert tables.coefficients.shape == (size, 1 + size)
    assert tables.noise_coefficients.shape == (size, size)
    assert not tables.coefficients[steps:].any()
    for array in (tables.timesteps, tables.input_scales, tables.coefficients):
        assert array.dtype == np.float32


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("ddim", {"clip_sample": True}),
        ("ddpm", {"clip_sample": True}),
        ("dpmpp_2m", {"thresholding": True}),
        ("unipc", {"thresholding": True}),
    ],
)
def test_a_scheduler_that_clips_has_no_table(name: str, changes: dict[str, Any]) -> None:
    with pytest.raises(NotLinearError, match="clips, thresholds or rounds"):
        make_tables(build(name, **changes))


def test_coefficients_that_are_not_finite_are_said() -> None:
    with pytest.raises(NotFiniteError, match="LCMScheduler"):
        make_tables(build("lcm", rescale_betas_zero_snr=True))


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("ddim", {"num_inference_steps": 2000}, "num_inference_steps 2000"),
        ("euler_a", {"sigmas": [14.0, 1.0, 0.0]}, "--sigmas"),
        ("ddim", {"timesteps": [999, 500]}, "--timesteps"),
        ("ddpm", {"timesteps": [10, 20]}, "descending"),
    ],
)
def test_what_diffusers_refuses_is_one_sentence(
    name: str, arguments: dict[str, Any], words: str
) -> None:
    sampler = Sampler(make_scheduler(SDXL_SETTINGS, SCHEDULERS[name].class_name, {}), **arguments)
    with pytest.raises(BadSettingError, match=words):
        make_tables(sampler)


def test_timesteps_and_sigmas_can_be_given() -> None:
    scheduler = make_scheduler(SDXL_SETTINGS, "EulerDiscreteScheduler", {})
    tables = make_tables(Sampler(scheduler, timesteps=[999, 700, 300]))
    assert tables.timesteps[:3].tolist() == [999, 700, 300]
    tables = make_tables(Sampler(scheduler, sigmas=[14.6, 3.0, 0.5, 0.0]))
    assert tables.evaluations == 3
    assert tables.initial_noise_scale == pytest.approx((14.6**2 + 1) ** 0.5)


def test_probing_leaves_the_libraries_as_they_were() -> None:
    for name in ("euler_a", "dpmpp_sde"):
        sampler = build(name, steps=5)
        module = sys.modules[type(sampler.scheduler).__module__]
        before = dict(vars(module))
        make_tables(sampler)
        assert vars(module) == before


class Wasteful(EulerAncestralDiscreteScheduler):
    """A scheduler that draws two noises in a step."""

    def step(self, *args: Any, generator: Any = None, **options: Any) -> Any:
        for _ in range(2):
            randn_tensor(args[0].shape, generator=generator)
        return super().step(*args, generator=generator, **options)


def test_a_scheduler_that_draws_too_many_noises() -> None:
    with refusal(BadSettingError, "Wasteful draws more noises than it has evaluations"):
        make_tables(Sampler(Wasteful(), num_inference_steps=4))


@pytest.mark.parametrize("end", [None, 0.6])
@pytest.mark.parametrize("name", sorted(SCHEDULERS.keys() - {"edm_euler"}))
def test_what_stays_is_noised_as_diffusers_does_it(name: str, end: float | None) -> None:
    """After every step by the level of the next; at the end of all steps not at all."""
    row, step_range = SCHEDULERS[name], StepRange(denoising_end=end)
    scheduler = make_scheduler(SDXL_SETTINGS, row.class_name, row.options)
    sampler = Sampler(scheduler, num_inference_steps=9, step_range=step_range)
    tables = make_tables(sampler, keeps_area=True)
    generator = torch.Generator().manual_seed(1)
    picture, noise = torch.randn((2, 1, *SHAPE), generator=generator)
    timesteps = sampler.restart()
    following = [*timesteps[1:], *(sampler.cut.following if end else [])]
    for i, timestep in enumerate(timesteps):
        sampler.scale_model_input(picture, timestep)
        sampler.step(picture, timestep, picture, [generator])
        expected = picture
        if i < len(following):
            expected = sampler.scheduler.add_noise(picture, noise, following[i][None])
        of_picture, of_noise = tables.kept_scales[i].tolist()
        found = of_picture * picture + of_noise * noise
        assert float((found - expected).norm() / expected.norm()) < 1e-5
    assert (of_noise == 0) == (end is None)
    assert not make_tables(sampler).kept_scales.any()


@pytest.mark.parametrize("name", sorted(SCHEDULERS.keys() - {"edm_euler"}))
def test_soft_masks_change_samples_between_the_steps(name: str) -> None:
    """Differential diffusion by the scheduler itself, and by the tables with the differences."""
    sampler = build(name, steps=9)
    generator = torch.Generator().manual_seed(1)
    picture, noise, first = torch.randn((3, 1, *SHAPE), generator=generator)
    mask = torch.rand((1, 1, *SHAPE[1:]), generator=generator)
    tables = make_tables(sampler, keeps_area=True, soft_masks=True)
    size, count = len(tables.timesteps), tables.evaluations
    assert tables.coefficients.shape == (size, 1 + 2 * size) and tables.history == 1 + 2 * size
    drawn: list[torch.Tensor] = []

    def keep(_: Any, draw: Any) -> torch.Tensor:
        drawn.append(draw())
        return drawn[-1]

    x, history = first, [first]
    by_tables, laid = first.double(), []
    with sampler.intercepted_noises(keep):
        for i, timestep in enumerate(sampler.restart([3])):
            # Both see what the scheduler's own samples give, so that rounding does not grow.
            history.append(nonlinear_model(sampler.scale_model_input(x, timestep), float(timestep)))
            x = sampler.step(history[-1], timestep, x, [generator])
            stays = 1 - mask > (i + 1) / count
            x = torch.where(stays, sampler.noised_after(i, picture, noise), x)
            row, of_noises = tables.coefficients[i].astype(float), tables.noise_coefficients[i]
            by_tables = sum(row[j] * h.double() for j, h in enumerate(history))
            by_tables = by_tables + sum(float(of_noises[k]) * n for k, n in enumerate(drawn))
            by_tables = by_tables + sum(row[1 + size + j] * d for j, d in enumerate(laid))
            of_picture, of_noise = tables.kept_scales[i].tolist()
            noised = (of_picture * picture + of_noise * noise).double()
            after = torch.where(mask >= float(tables.free_from[i]), by_tables, noised)
            laid.append(after - by_tables)
    scale = float(first.norm() / x.norm())  # of what the sums round at
    assert float((after - x).norm() / x.norm()) < ROUNDING * max(1, scale)
    assert (mask >= float(tables.free_from[count - 1])).all()  # the last step is everybody's
