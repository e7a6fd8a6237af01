"""Turn a diffusers scheduler into tables of coefficients, read off its own `step()`.

Nearly every diffusers scheduler is linear in what it is fed: the initial latents x₀, the model's
outputs ε₁ … ε_T and the noises n₁ … n_K that it draws. After model evaluation i the sample is

    x_i = Σ_j coefficients[i, j]·h_j + Σ_k noise_coefficients[i, k]·n_k,  h = (x₀, ε₁, …, ε_T),

and the model's next input is `input_scales[i]`·x_{i-1}. Running the scheduler on basis vectors in
place of pictures gives the coefficients, whatever it does inside (multistep history, second-order
pairs of evaluations, predictor and corrector). No scheduler's arithmetic is written again here.
"""

import contextlib
import inspect
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from common.errors import BadSettingError, NotFiniteError

# Tables are padded to multiples of this many model evaluations (and noises), so that the number of
# steps is data and not a shape: 64 holds 50 steps, or 32 of a scheduler that evaluates twice.
BUCKET = 64


@dataclass(frozen=True, kw_only=True)
class SchedulerTables:
    """A scheduler as data. T model evaluations, padded to S; float32 throughout."""

    evaluations: int  # T
    noises: int  # K, how many standard normal tensors the scheduler draws
    initial_noise_scale: float  # diffusers' init_noise_sigma
    timesteps: np.ndarray  # [S], may be fractional
    input_scales: np.ndarray  # [S]
    coefficients: np.ndarray  # [S, 1 + S]
    noise_coefficients: np.ndarray  # [S, S]


def make_tables(scheduler: Any, num_inference_steps: int) -> SchedulerTables:
    """Probe a diffusers scheduler on the CPU.

    Args:
        scheduler: a diffusers scheduler; its state is overwritten.
        num_inference_steps: as diffusers' pipelines take it; second-order schedulers evaluate the
            model more often.

    Raises:
        BadSettingError: the scheduler refuses the settings or is not linear.
        NotFiniteError: its coefficients are not finite.
    """
    name = type(scheduler).__name__
    try:
        scheduler.set_timesteps(num_inference_steps)
    except (ValueError, IndexError, TypeError, RuntimeError) as error:
        raise BadSettingError(
            f"{name} refuses --num_inference_steps {num_inference_steps} with the checkpoint's "
            f"scheduler settings: {error}"
        ) from None
    timesteps = scheduler.timesteps.to(torch.float32).numpy()
    count = len(timesteps)
    first_noise = 1 + count

    # Basis vectors: 0 is x₀, 1 … T the model's outputs, from T + 1 on the noises in their order.
    # A step draws at most a few noises.
    dimension = first_noise + 4 * count
    drawn = 0

    def draw_basis(shape: Any, *_: Any, **__: Any) -> torch.Tensor:
        nonlocal drawn
        vector = _basis_vector(dimension, first_noise + drawn)
        drawn += 1
        return vector.reshape(shape)

    rows = np.zeros((count, dimension))
    input_scales = np.zeros(count)
    sample = _basis_vector(dimension, 0)
    with _drawing(scheduler, draw_basis):
        for i, timestep in enumerate(scheduler.timesteps):
            model_input = scheduler.scale_model_input(sample, timestep)
            input_scales[i] = _ratio(model_input, sample)
            sample = _step(scheduler, _basis_vector(dimension, 1 + i), timestep, sample)
            rows[i] = sample.double().flatten().numpy()
    if drawn > count:
        raise BadSettingError(f"{name} draws {drawn} noises in {count} steps, more than supported")
    if not (np.isfinite(rows).all() and np.isfinite(input_scales).all()):
        raise NotFiniteError(
            f"{name} gives coefficients that are not finite for {num_inference_steps} steps with "
            "the checkpoint's scheduler settings: choose another --scheduler"
        )
    # `set_timesteps` also chose the scale of the initial noise: read it only now.
    initial_noise_scale = float(scheduler.init_noise_sigma)
    _check_linear(scheduler, num_inference_steps, rows, input_scales, drawn)

    size = math.ceil(count / BUCKET) * BUCKET
    coefficients = np.zeros((size, 1 + size), np.float32)
    coefficients[:count, : 1 + count] = rows[:, :first_noise]
    noise_coefficients = np.zeros((size, size), np.float32)
    noise_coefficients[:count, :drawn] = rows[:, first_noise : first_noise + drawn]
    return SchedulerTables(
        evaluations=count,
        noises=drawn,
        initial_noise_scale=initial_noise_scale,
        timesteps=np.pad(timesteps, (0, size - count)),
        input_scales=np.pad(input_scales, (0, size - count)).astype(np.float32),
        coefficients=coefficients,
        noise_coefficients=noise_coefficients,
    )


def _check_linear(
    scheduler: Any, steps: int, rows: np.ndarray, input_scales: np.ndarray, drawn: int
) -> None:
    """Run the scheduler on random numbers of picture-like size and compare with the tables.

    Values well above 1 make clipping and thresholding show.
    """
    generator = torch.Generator().manual_seed(0)
    scheduler.set_timesteps(steps)
    count = len(scheduler.timesteps)
    history = torch.randn((1 + count + drawn, 64), generator=generator) * 3
    history[0] *= float(scheduler.init_noise_sigma)
    used = 0

    def draw_next(shape: Any, *_: Any, **__: Any) -> torch.Tensor:
        nonlocal used
        used += 1
        return history[count + used].reshape(shape)

    sample = history[0].reshape(1, 1, 1, 64)
    error = 0.0
    with _drawing(scheduler, draw_next):
        for i, timestep in enumerate(scheduler.timesteps):
            scheduler.scale_model_input(sample, timestep)
            sample = _step(scheduler, history[1 + i].reshape(1, 1, 1, 64), timestep, sample)
            expected = torch.from_numpy(rows[i, : len(history)]) @ history.double()
            difference = (sample.double().flatten() - expected).norm()
            scale = (
                torch.from_numpy(np.abs(rows[i, : len(history)])) @ history.abs().double()
            ).norm()
            error = max(error, float(difference / scale))
    if not error < 1e-4:
        raise BadSettingError(
            f"{type(scheduler).__name__} is not linear with the checkpoint's scheduler settings "
            f"(clip_sample or thresholding; error {error:.1e}) and cannot be compiled: choose "
            "another --scheduler"
        )


def _basis_vector(dimension: int, index: int) -> torch.Tensor:
    vector = torch.zeros(1, 1, 1, dimension)
    vector[..., index] = 1
    return vector


def _ratio(scaled: torch.Tensor, sample: torch.Tensor) -> float:
    numerator = scaled.double().flatten() @ sample.double().flatten()
    return float(numerator / sample.double().square().sum())


def _step(
    scheduler: Any, output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor
) -> torch.Tensor:
    options: dict[str, Any] = {"return_dict": False}
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = torch.Generator().manual_seed(0)
    stepped: torch.Tensor = scheduler.step(output, timestep, sample, **options)[0]
    return stepped


@contextlib.contextmanager
def _drawing(scheduler: Any, draw: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Let the scheduler's module draw its noises by `draw`."""
    module = sys.modules[type(scheduler).__module__]
    original = getattr(module, "randn_tensor", None)
    if original is None:
        yield
        return
    module.randn_tensor = draw  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.randn_tensor = original  # type: ignore[attr-defined]
