"""Denoising a group of images: what is drawn and prepared for it, and the driver of its steps.

Everything about the sampler is data: scheduler tables, timesteps, noises, guidance and the range of
steps are arguments of what a backend computes. `jax_denoising` is the compiled program,
`torch_denoising` the same module in PyTorch.
"""

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.embeddings import get_timestep_embedding

from common.compute.profile_tables import Profiler
from common.files.report import StageReport
from common.runs.generation import RunOptions
from common.sampling.sampler import Sampler
from common.sampling.scheduler_tables import SchedulerTables

# A backend's latents [B, C, h, w], history [1 + S, B, C, h, w], and what else it keeps; of a
# scheduler on the host the latents alone.
State = tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6), under diffusers' names."""

    scale: float
    rescale: float = 0.0
    start: float = 0.0
    end: float = 1.0

    def guided_steps(self, evaluations: int) -> range:
        """The model evaluations that compute the unconditional half as well.

        Like diffusers' `ClassifierFreeGuidance`, int(start·T) ≤ i < int(end·T), with T the number
        of model evaluations; none at a scale of 1 or less, as in diffusers' pipelines.
        """
        if self.scale <= 1:
            return range(0)
        return range(int(self.start * evaluations), int(self.end * evaluations))


@dataclass(frozen=True, kw_only=True)
class NoiseBatch:
    """What is drawn for a batch of B images, float32, by one generator per image."""

    initial_latents: np.ndarray  # [B, C, h, w], scaled by the scheduler's initial_noise_scale
    noises: np.ndarray  # [S, B, C, h, w]; zeros after the K that the scheduler draws


def prepare_noise(
    seeds: Sequence[int],
    sampler: Sampler,
    tables: SchedulerTables,
    latent_shape: tuple[int, int, int],
) -> NoiseBatch:
    """Draw the initial latents and the scheduler's noises as diffusers does.

    Each image has a `torch.Generator` of its own on the CPU: first it draws the initial latents,
    then the scheduler itself, stepped on zeros, draws its noises from it.
    """
    size = len(tables.timesteps)
    initial = np.empty((len(seeds), *latent_shape), np.float32)
    noises = np.zeros((size, len(seeds), *latent_shape), np.float32)
    for index, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        drawn = draw_initial_latents(generator, latent_shape, tables.initial_noise_scale)
        initial[index] = drawn[0].numpy()
        if tables.noises:
            noises[: tables.noises, index] = draw_noises(sampler, seed, generator, latent_shape)
    return NoiseBatch(initial_latents=initial, noises=noises)


def draw_initial_latents(
    generator: torch.Generator, latent_shape: tuple[int, int, int], scale: float
) -> torch.Tensor:
    """One image's initial latents [1, C, h, w] float32, the first that its generator draws."""
    return torch.randn((1, *latent_shape), generator=generator) * scale


def draw_noises(
    sampler: Sampler, seed: int, generator: torch.Generator, latent_shape: tuple[int, int, int]
) -> np.ndarray:
    """Let a scheduler draw all its noises for one image. Returns [K, C, h, w] float32."""
    drawn: list[np.ndarray] = []

    def keep(_: tuple[int, ...], draw: Callable[[], torch.Tensor]) -> torch.Tensor:
        noise = draw()
        drawn.append(noise[0].numpy())
        return noise

    zeros = torch.zeros(1, *latent_shape)
    timesteps = sampler.restart([seed])
    with sampler.hearing_noises(keep):
        for timestep in timesteps:
            sampler.scale_model_input(zeros, timestep)
            sampler.step(zeros, timestep, zeros, [generator])
    return np.stack(drawn)


def prepare_state(noise: NoiseBatch) -> tuple[np.ndarray, np.ndarray]:
    """Latents [B, C, h, w] and history [1 + S, B, C, h, w] before the first step.

    The history holds the initial latents and the model's outputs so far.
    """
    history = np.zeros((1 + len(noise.noises), *noise.initial_latents.shape), np.float32)
    history[0] = noise.initial_latents
    return noise.initial_latents, history


def prepare_conditions(
    embeddings: Mapping[str, torch.Tensor],
    size_conditions: Mapping[str, Sequence[int]] | None,
    timestep_cond: torch.Tensor | None,
    dtype: torch.dtype,
    *,
    guided: bool,
) -> dict[str, torch.Tensor]:
    """What the UNet is told of each image besides the latents.

    Args:
        embeddings: stage 1's tensors, one row per image: [B, L, D] and, pooled, [B, E].
        size_conditions: SDXL's `time_ids` and `negative_time_ids`, six numbers each; float32 on
            every backend, because bfloat16 rounds them.
        timestep_cond: [1, G], for a UNet that takes the guidance scale as an embedding.
        dtype: the model's dtype.
        guided: both halves of guidance, which lie beside each other, [image, half], so that a
            batch split over devices stays whole there.
    """
    signs = ("negative_", "") if guided else ("",)

    def both_halves(name: str) -> torch.Tensor:
        return (
            torch.stack([embeddings[f"{sign}{name}"] for sign in signs], 1).flatten(0, 1).to(dtype)
        )

    conditions = {"prompt_embeds": both_halves("prompt_embeds")}  # [2B, L, D]
    rows = len(conditions["prompt_embeds"])
    if size_conditions is not None:
        conditions["text_embeds"] = both_halves("pooled_prompt_embeds")  # [2B, E]
        ids = [[float(n) for n in size_conditions[f"{sign}time_ids"]] for sign in signs]
        conditions["time_ids"] = torch.tensor(ids).repeat(rows // len(signs), 1)  # [2B, 6]
    if timestep_cond is not None:
        conditions["timestep_cond"] = timestep_cond.repeat(rows, 1).to(dtype)
    return conditions


def embed_guidance_scale(scale: float, dimension: int) -> torch.Tensor:
    """The guidance scale as distilled UNets (LCM) take it: [1, dimension] float32.

    That of scale − 1 in diffusers' `get_guidance_scale_embedding`, but for the rounding of angles
    of thousands of radians; that one stands in a module that imports text encoders.
    """
    weight = torch.tensor([(scale - 1) * 1000.0])
    return get_timestep_embedding(weight, dimension, downscale_freq_shift=1)


def prepare_schedule(tables: SchedulerTables, guidance: Guidance) -> dict[str, np.ndarray]:
    """Tables and guidance, as the program takes them."""
    return {
        "timesteps": tables.timesteps,
        "input_scales": tables.input_scales,
        "coefficients": tables.coefficients,
        "noise_coefficients": tables.noise_coefficients,
        **prepare_guidance(guidance),
    }


def prepare_guidance(guidance: Guidance) -> dict[str, np.ndarray]:
    """Guidance, as the program takes it."""
    return {
        "guidance_scale": np.asarray(guidance.scale, np.float32),
        "guidance_rescale": np.asarray(guidance.rescale, np.float32),
    }


class Denoiser(ABC):
    """The UNet of a backend, and the driver of its steps.

    For each group `start`, then `compile` (which compiles only what is not compiled yet), `run`
    and `latents`. Scheduler, steps and guidance may be others for each group.
    """

    loops_on_device: bool  # whether one call runs a range of steps
    ranges_ahead: int  # handed to the devices beyond the one that runs
    devices_of_images: int  # that a group's images are spread over
    state: State

    def __init__(self, unet: Any, options: RunOptions, report: StageReport) -> None:
        """`unet` is diffusers' module, in the dtype that it computes in."""
        self.unet = unet
        self.dtype: torch.dtype = unet.dtype
        self.guidance_dimension: int | None = unet.config.time_cond_proj_dim
        self.steps_per_call = options.steps_per_call
        self.report = report

    def start(
        self,
        embeddings: Mapping[str, torch.Tensor],
        seeds: Sequence[int],
        sampler: Sampler,
        tables: SchedulerTables | None,
        guidance: Guidance,
        size_conditions: Mapping[str, Sequence[int]] | None,
        latent_shape: tuple[int, int, int],
    ) -> None:
        """Put a group's conditions, noises and tables where they are computed with.

        Args:
            tables: the sampler's; None steps the sampler itself on the host.
        """
        timestep_cond = None
        if self.guidance_dimension is not None:
            # A distilled UNet is told the scale and computes no unconditional half.
            timestep_cond = embed_guidance_scale(guidance.scale, self.guidance_dimension)
            guidance = Guidance(scale=1.0)
        self.sampler, self.tables, self.seeds = sampler, tables, list(seeds)
        self.done, self.at_rest = 0, True
        self.trajectory: list[np.ndarray] = []
        self.latent_shape = latent_shape
        if tables is None:
            self.evaluations = len(sampler.restart(self.seeds))
        else:
            self.evaluations = tables.evaluations
            with self.report.part("noise"):
                self.noise = prepare_noise(seeds, sampler, tables, latent_shape)
        self.guided = guidance.guided_steps(self.evaluations)
        # With guidance (True), without, or both.
        self.kinds = sorted({i in self.guided for i in range(self.evaluations)})
        conditions = {
            guided: prepare_conditions(
                embeddings, size_conditions, timestep_cond, self.dtype, guided=guided
            )
            for guided in self.kinds
        }
        with self.report.part("host_to_device"):
            self._put(conditions, guidance)
            if tables is not None:
                self.state = self._first_state()

    @abstractmethod
    def _put(self, conditions: dict[bool, dict[str, torch.Tensor]], guidance: Guidance) -> None:
        """Put what `start` prepared where it is computed with.

        Args:
            conditions: of each of the group's `kinds` of steps.
        """

    @abstractmethod
    def compile(self) -> None:
        """Compile what the group needs and is not compiled yet."""

    def _first_state(self) -> State:
        """The state before the first step, by `noise`."""
        return self._restore(*prepare_state(self.noise), 0)

    @abstractmethod
    def _start_steps(self, state: State, steps: range, guided: bool) -> tuple[State, Any]:
        """Start some steps; `state` is given away.

        Returns the state after them, and what `_wait_for` waits for.
        """

    @abstractmethod
    def _wait_for(self, done: Any) -> None:
        """Wait until steps that were started are done."""

    @abstractmethod
    def _predict(self, model_input: torch.Tensor, timestep: float, guided: bool) -> torch.Tensor:
        """One model evaluation, [B, C, h, w] float32 to the same, for a scheduler on the host."""

    @abstractmethod
    def _fetch(self, array: Any) -> np.ndarray:
        """An array of a state on the host; it may change with the state."""

    @abstractmethod
    def _restore(self, latents: np.ndarray, history: np.ndarray, step: int) -> State:
        """The state before a step, from what `_fetch` gave."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What the report says of the devices."""

    @abstractmethod
    def profiler(self, folder: Path, steps: range) -> Profiler:
        """A profiler of some steps, whose trace goes to a folder."""

    def flops(self, guided: bool) -> float:
        """Of one step on all devices; 0 where they are not counted."""
        return 0.0

    def freed_half(self) -> str | None:
        """What devices do in steps without guidance that share a step with it, as a sentence."""
        return None

    def warm_up(self, steps: int) -> None:
        """Run steps of each kind on a state of their own."""
        if not steps:
            return
        with self.report.part("warm_up"):
            for guided in self.kinds:
                if self.tables is None:
                    for _ in range(steps):
                        zeros = torch.zeros(len(self.seeds), *self.latent_shape)
                        self._predict(zeros, 0.0, guided)
                else:
                    some = range(min(steps, self.evaluations))
                    self._wait_for(self._start_steps(self._first_state(), some, guided)[1])

    @property
    def can_resume(self) -> bool:
        """Whether `resume` can take a group up again: a scheduler on the host keeps more state."""
        return self.tables is not None

    def resume(self, kept: Mapping[str, torch.Tensor]) -> None:
        """Go on from what `state_to_keep` gave, after `start`."""
        self.done = int(kept["step"])
        self.state = self._restore(kept["latents"].numpy(), kept["history"].numpy(), self.done)
        self.trajectory = [latents.numpy() for latents in kept["trajectory"]]

    def state_to_keep(self) -> dict[str, torch.Tensor]:
        """The group's state; only while the denoiser is `at_rest`."""
        assert self.at_rest and self.can_resume
        with self.report.part("device_to_host"):
            arrays = [self._fetch(array).copy() for array in self.state[:2]]
        latents, history = map(torch.from_numpy, arrays)
        trajectory = [torch.from_numpy(kept.copy()) for kept in self.trajectory]
        return {
            "step": torch.tensor(self.done),
            "latents": latents,
            "history": history,
            "trajectory": torch.stack(trajectory) if trajectory else torch.empty(0),
        }

    def run(
        self,
        *,
        keep_after: Collection[int] = (),
        rest_after: Collection[int] = (),
        rest: Callable[[], bool] = bool,
        profiler: Profiler | None = None,
    ) -> Iterator[int]:
        """Run all steps that are not `done`, in ranges. Yields the number of steps of each.

        Args:
            keep_after: numbers of steps after which the latents are kept in `trajectory`.
            rest_after: those after which nothing is handed over until the caller asks for more.
            rest: whether to rest after what is handed over already.
            profiler: watches its steps, called one by one.
        """
        window = range(0) if profiler is None else profiler.steps
        if profiler is not None and window.start == 0:
            profiler.start()
        borders = {*keep_after, *rest_after, window.start, window.stop}
        for steps in self._run_steps("run", borders, rest, profiler, start=self.done):
            self.done = steps.stop
            if steps.stop in keep_after:
                self.trajectory.append(self.latents())
            if profiler is not None and steps.stop == window.start:
                profiler.start()
            if profiler is not None and steps.stop == window.stop:
                profiler.stop()
            yield len(steps)

    def repeat(self, times: int) -> None:
        """Measure all steps some times more; what the first run gave stays as it is."""
        result = self.state
        for _ in range(times):
            with self.report.part("repeats"):
                if self.tables is not None:
                    self.state = self._first_state()
                    self._wait_for(self.state)
                began = time.perf_counter()
                for _ in self._run_steps("repeats"):
                    pass
                self.report.repeats.append(time.perf_counter() - began)
        self.state = result

    def _ranges(self, start: int, borders: Collection[int], singly: range) -> list[range]:
        """The ranges of steps to call from `start` on; those in `singly` one by one."""
        step = self.steps_per_call or (self.evaluations if self.loops_on_device else 1)
        if self.tables is None:
            step = 1
        # Where guidance begins or ends, another program takes over.
        guided = (self.guided.start, self.guided.stop)
        every = {*range(0, self.evaluations, step), *guided, *borders, *singly, start}
        starts = sorted(i for i in every if start <= i < self.evaluations)
        stops = [*starts[1:], self.evaluations]
        return [range(*ends) for ends in zip(starts, stops, strict=True)] if starts else []

    def _run_steps(
        self,
        part: str,
        borders: Collection[int] = (),
        rest: Callable[[], bool] = bool,
        profiler: Profiler | None = None,
        *,
        start: int = 0,
    ) -> Iterator[range]:
        """Run the steps from `start` on. Yields each range when it is done.

        A range is handed to the devices before the one before it is finished, so that they never
        wait for the host; but none beyond one of `borders`, or after `rest` said so, before all
        are done and the caller asks for more. Then `at_rest` is true.

        Args:
            part: of the report, to count the seconds as; those of profiled steps are `profile`.
        """
        window = range(0) if profiler is None else profiler.steps
        by_tables = self.tables is not None
        advance = self._ahead_by_tables if by_tables else self._ahead_on_host()
        ahead = self.ranges_ahead if by_tables else 0
        running: deque[tuple[range, Any, str]] = deque()  # what is there when the steps are done
        ended = time.perf_counter()
        for steps in self._ranges(start, borders, window):
            counted = "profile" if steps.start in window else part
            with self.report.part(counted):
                if profiler is not None and steps.start in window:
                    with profiler.step(steps.start):
                        done = advance(steps)
                else:
                    done = advance(steps)
            running.append((steps, done, counted))
            is_last = steps.stop == self.evaluations
            all_of_them = is_last or steps.stop in borders or rest()
            while running and (all_of_them or len(running) > ahead):
                ended = self._wait(*running[0], since=ended)
                finished, *_ = running.popleft()
                self.at_rest = not running
                yield finished
                if self.at_rest:  # what the caller did meanwhile is not the next step's
                    ended = time.perf_counter()

    def _wait(self, steps: range, done: Any, part: str, *, since: float) -> float:
        """Wait for a range of steps, and report it. Returns when it ended."""
        with self.report.part(part):
            self._wait_for(done)
        ended = time.perf_counter()
        self.report.count_flops(part, self.flops(steps.start in self.guided) * len(steps))
        if part == "run" and len(steps) == 1:
            self.report.step_seconds.append(ended - since)
        return ended

    def _ahead_by_tables(self, steps: range) -> Any:
        """Start the next steps. Returns what is there when they are done."""
        self.state, done = self._start_steps(self.state, steps, steps.start in self.guided)
        return done

    def _ahead_on_host(self) -> Callable[[range], Any]:
        """A function that steps the scheduler itself after a model evaluation."""
        generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        timesteps = self.sampler.restart(self.seeds)
        scale = self.sampler.initial_noise_scale
        drawn = [draw_initial_latents(g, self.latent_shape, scale) for g in generators]
        self.state = (torch.cat(drawn),)

        def advance(steps: range) -> None:
            (i,), (latents,) = steps, self.state
            model_input = self.sampler.scale_model_input(latents, timesteps[i])
            noise_pred = self._predict(model_input, float(timesteps[i]), i in self.guided)
            self.state = (self.sampler.step(noise_pred, timesteps[i], latents, generators),)

        return advance

    def latents(self) -> np.ndarray:
        """The group's latents [B, C, h, w] float32."""
        if self.tables is None:
            return np.array(self.state[0].numpy())
        with self.report.part("device_to_host"):
            return self._fetch(self.state[0]).copy()
