"""Turn a diffusers scheduler into tables of coefficients, read off its own `step()`.

Nearly every diffusers scheduler is linear in what it is fed: the initial latents x₀, the model's
outputs ε₁ … ε_T and the noises n₁ … n_K that it draws. After model evaluation i the sample is

    x_i = Σ_j coefficients[i, j]·h_j + Σ_k noise_coefficients[i, k]·n_k,  h = (x₀, ε₁, …, ε_T),

and the model's next input is `input_scales[i]`·x_{i-1}. Running the scheduler on basis vectors in
place of pictures gives the coefficients, whatever it does inside (multistep history, second-order
pairs of evaluations, predictor and corrector). No scheduler's arithmetic is written again here.

Where soft masks change some samples after an evaluation, h goes on with the differences d₁ … d_T
that were added to them, and so do the coefficients: what a difference leads to is probed as well.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from common.errors import BadSettingError, NotFiniteError
from common.sampling.sampler import Sampler

# Tables are padded to multiples of this many model evaluations (and noises), so that the number of
# steps is data and not a shape: 64 holds 50 steps, or 32 of a scheduler that evaluates twice.
BUCKET = 64
ROUNDING_OF_MASKS = 1e-6
MOST_KNOWN = 64  # tables that a process keeps, some 50 kB each
LINEAR_TO = 1e-4  # relative; float32 rounding of 50 steps stays below 1e-6


_known: "OrderedDict[tuple[str, bool, bool], SchedulerTables]" = OrderedDict()


class NotLinearError(Exception):
    """The scheduler is no linear function of what it is fed, so no table can stand for it."""


@dataclass(frozen=True, kw_only=True)
class SchedulerTables:
    """A scheduler as data. T model evaluations, padded to S; float32 throughout.

    Where each image of a group has its own, an axis of images stands before the others.
    """

    evaluations: int  # T
    noises: int  # K, how many noises the scheduler draws
    initial_noise_scale: float  # diffusers' init_noise_sigma
    timesteps: np.ndarray  # [S], may be fractional
    input_scales: np.ndarray  # [S]
    coefficients: np.ndarray  # [S, 1 + S], with soft masks [S, 1 + 2 S]
    noise_coefficients: np.ndarray  # [S, S]
    # Of a picture's latents and of the noise on them, where they stay what they are: after each
    # model evaluation [S, 2]. Zeros where nothing stays.
    kept_scales: np.ndarray
    # After each model evaluation the least mask of what follows the scheduler; the rest is what it
    # was, noised [S].
    free_from: np.ndarray

    @property
    def history(self) -> int:
        """How many tensors the coefficients weigh."""
        return int(self.coefficients.shape[-1])


def stacked(tables: Sequence[SchedulerTables]) -> SchedulerTables:
    """The tables of a group's images as one, [B, …] each.

    Of an image that needs fewer evaluations the last row comes again and again. It weighs what is
    there by then, and gives the same latents each time.

    Args:
        tables: of each image, of the same shapes.
    """
    first, found = tables[0], dict[str, np.ndarray]()
    for field in fields(SchedulerTables):
        if not isinstance(getattr(first, field.name), np.ndarray):
            continue
        own = ((getattr(each, field.name), each.evaluations) for each in tables)
        rows = [table[np.minimum(np.arange(len(table)), last - 1)] for table, last in own]
        found[field.name] = np.stack(rows)
    return SchedulerTables(
        evaluations=max(each.evaluations for each in tables),
        noises=max(each.noises for each in tables),
        initial_noise_scale=first.initial_noise_scale,  # what is begun with has been drawn
        **found,
    )


def make_tables(
    sampler: Sampler, *, keeps_area: bool = False, soft_masks: bool = False
) -> SchedulerTables:
    """Probe a scheduler on the CPU; its state is overwritten.

    What was probed before in this process is taken: arrays that nobody writes to.

    Args:
        keeps_area: whether a part of the pictures stays, for `kept_scales`.
        soft_masks: whether it stays for a part of the steps, by its mask.

    Raises:
        BadSettingError: diffusers refuses the settings.
        NotFiniteError: the coefficients are not finite.
        NotLinearError: the scheduler clips, thresholds, or rounds coarsely.
    """
    key = (sampler.identity(), keeps_area, soft_masks)
    if key in _known:
        _known.move_to_end(key)
    else:
        _known[key] = _make(sampler, keeps_area=keeps_area, soft_masks=soft_masks)
        while len(_known) > MOST_KNOWN:
            _known.popitem(last=False)
    return _known[key]


def _make(sampler: Sampler, *, keeps_area: bool, soft_masks: bool) -> SchedulerTables:
    timesteps = sampler.restart().to(torch.float32).numpy()
    count = len(timesteps)
    size = math.ceil(count / BUCKET) * BUCKET
    probed = _probe(sampler, keeps_area=keeps_area, soft_masks=soft_masks)
    of_history, of_noises, of_differences = np.split(probed.rows, [1 + count, 1 + 2 * count], 1)
    blocks = [_padded(of_history, size, 1 + size)]
    if soft_masks:
        blocks.append(_padded(of_differences, size, size))
    return SchedulerTables(
        evaluations=count,
        noises=probed.noises,
        initial_noise_scale=sampler.initial_noise_scale,
        timesteps=_padded(timesteps, size),
        input_scales=_padded(probed.input_scales, size),
        coefficients=np.concatenate(blocks, axis=1),
        noise_coefficients=_padded(of_noises, size, size),
        kept_scales=_padded(probed.kept_scales, size, 2),
        free_from=_padded(free_from(count, soft_masks=soft_masks), size),
    )


@dataclass(frozen=True, kw_only=True)
class _Probed:
    """What a scheduler gave on basis vectors, float64."""

    rows: np.ndarray  # after each evaluation, [T, 1 + T + T], with soft masks [T, 1 + T + T + T]
    noises: int  # that it drew, K ≤ T
    input_scales: np.ndarray  # [T]
    kept_scales: np.ndarray  # [T, 2]


def _probe(sampler: Sampler, *, keeps_area: bool, soft_masks: bool) -> _Probed:
    timesteps = sampler.restart()
    count = len(timesteps)
    # Basis vectors: 0 is x₀, 1 … T the model's outputs, from T + 1 on the noises in their order,
    # from 2 T + 1 on the differences.
    first_difference = 1 + 2 * count
    dimension = first_difference + (count if soft_masks else 0)
    drawn = 0

    def hear_basis(shape: tuple[int, ...], _: Callable[[], torch.Tensor]) -> torch.Tensor:
        nonlocal drawn
        drawn += 1
        if drawn > count:
            raise BadSettingError(
                f"{sampler.name} draws more noises than it has evaluations: choose another "
                "--scheduler"
            )
        return _basis_vector(dimension, count + drawn).reshape(shape)

    rows = np.zeros((count, dimension))
    input_scales, kept_scales = np.zeros(count), np.zeros((count, 2))
    original, noise = torch.eye(2).reshape(2, 1, 1, 1, 2)
    sample = _basis_vector(dimension, 0)
    with sampler.intercepted_noises(hear_basis):
        for i, timestep in enumerate(timesteps):
            input_scales[i] = _ratio(sampler.scale_model_input(sample, timestep), sample)
            sample = sampler.step(_basis_vector(dimension, 1 + i), timestep, sample, _unused())
            rows[i] = sample.double().flatten().numpy()
            if soft_masks:
                sample = sample + _basis_vector(dimension, first_difference + i)
            if keeps_area:
                kept = sampler.noised_after(i, original, noise)
                kept_scales[i] = kept.double().flatten().numpy()
    if not (np.isfinite(rows).all() and np.isfinite(input_scales).all()):
        raise NotFiniteError(
            f"{sampler.name} gives coefficients that are not finite with {sampler.spacing} and "
            "these scheduler settings: change --scheduler or --scheduler_option"
        )
    _check_linear(sampler, rows, input_scales)
    return _Probed(rows=rows, noises=drawn, input_scales=input_scales, kept_scales=kept_scales)


def free_from(count: int, *, soft_masks: bool) -> np.ndarray:
    """After each of some model evaluations the least mask of what follows the scheduler, [T].

    With soft masks those of differential diffusion (Levin and Fried 2023, "Giving Each Pixel Its
    Strength"): what has the mask m stays the noised picture before evaluation i of N while
    1 - m > i / N. Masks are means of 64 pixels in float32, so that some are smaller by a last bit.
    """
    if not soft_masks:
        return np.full(count, 0.5)
    return 1 - np.arange(1, count + 1) / count - ROUNDING_OF_MASKS


def _padded(values: np.ndarray, *shape: int) -> np.ndarray:
    """Values with zeros after them, float32."""
    after = [(0, to - size) for size, to in zip(values.shape, shape, strict=True)]
    return np.pad(values, after).astype(np.float32)


def _check_linear(sampler: Sampler, rows: np.ndarray, input_scales: np.ndarray) -> None:
    """Run the scheduler on random numbers of picture-like size and compare with the tables.

    Values well above 1 make clipping and thresholding show.
    """
    timesteps = sampler.restart()
    count = len(timesteps)
    generator = torch.Generator().manual_seed(0)
    history = torch.randn((rows.shape[1], 1, 1, 1, 64), generator=generator) * 3
    history[0] *= sampler.initial_noise_scale
    differences = history[1 + 2 * count :]
    used = 0

    def hear_next(shape: tuple[int, ...], _: Callable[[], torch.Tensor]) -> torch.Tensor:
        nonlocal used
        used += 1
        return history[count + used].reshape(shape)

    flat = history.reshape(len(history), -1).double()
    sample = history[0]
    error = 0.0
    with sampler.intercepted_noises(hear_next):
        for i, timestep in enumerate(timesteps):
            model_input = sampler.scale_model_input(sample, timestep)
            difference = (model_input - input_scales[i] * sample).norm()
            error = max(error, float(difference / model_input.norm()))
            sample = sampler.step(history[1 + i], timestep, sample, _unused())
            row = torch.from_numpy(rows[i])
            difference = (sample.double().flatten() - row @ flat).norm()
            error = max(error, float(difference / (row.abs() @ flat.abs()).norm()))
            if len(differences):
                sample = sample + differences[i]
    if not error < LINEAR_TO:
        raise NotLinearError(f"it clips, thresholds or rounds: not linear by {error:.0e}")


def _basis_vector(dimension: int, index: int) -> torch.Tensor:
    vector = torch.zeros(1, 1, 1, dimension)
    vector[..., index] = 1
    return vector


def _ratio(scaled: torch.Tensor, sample: torch.Tensor) -> float:
    numerator = scaled.double().flatten() @ sample.double().flatten()
    return float(numerator / sample.double().square().sum())


def _unused() -> list[torch.Generator]:
    """A generator for schedulers that ask for one; every noise is given in its place."""
    return [torch.Generator().manual_seed(0)]
