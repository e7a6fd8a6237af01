"""Denoising a group of images: what is prepared for it, and the driver of its steps.

Everything about the sampler is data: scheduler tables, timesteps, noises, guidance and the range of
steps are arguments of what a backend computes. `jax_denoiser` is the compiled program,
`torch_denoiser` the same module in PyTorch.
"""

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.compute.clock import StageReport
from common.compute.options import RunOptions
from common.compute.profile_tables import Profiler
from common.sampling.noise import prepare_state
from common.sampling.scheduler_tables import SchedulerTables, free_from
from common.sampling.share import (
    Share,
    guidance_weights,
    kept_areas,
    tables_of_images,
    told_of,
)
from common.sampling.step_plan import StepPlan, StepProgram

# A backend's latents [B, C, h, w], history [R, B, C, h, w], and what else it keeps; of a
# scheduler on the host the latents alone.
State = tuple[Any, ...]
LEAST_LOOKS = 8  # that may be taken while a watched group is denoised
Conditions = dict[StepProgram, dict[str, torch.Tensor]]  # what each program's UNet is told


def prepare_schedule(tables: SchedulerTables) -> dict[str, np.ndarray]:
    """Scheduler tables, as the program takes them."""
    return {
        "timesteps": tables.timesteps,
        "input_scales": tables.input_scales,
        "coefficients": tables.coefficients,
        "noise_coefficients": tables.noise_coefficients,
        "kept_scales": tables.kept_scales,
        "free_from": tables.free_from,
    }


class Denoiser(ABC):
    """One run's denoising by the UNet of a backend, and the driver of its steps.

    For each group `start`, then `compile` (which compiles only what is not compiled yet), `run`
    and `latents`. Scheduler, steps and guidance may be others for each group.
    """

    loops_on_device: bool  # whether one call runs a range of steps
    ranges_ahead: int  # handed to the devices beyond the one that runs
    devices_of_images: int  # that a group's images are spread over
    takes_several: bool  # whether a group may have images of several runs
    state: State

    def __init__(self, unet: Any, options: RunOptions, report: StageReport) -> None:
        """`unet` is diffusers' module, in the dtype that it computes in."""
        self.unet = unet
        self.dtype: torch.dtype = unet.dtype
        self.steps_per_call = options.steps_per_call
        self.report = report

    def start(self, *shares: Share) -> None:
        """Put a group's conditions, noises and tables where they are computed with.

        Args:
            shares: of one run, or of several that a denoiser which `takes_several` can do at once:
                with the same program for all steps, conditions of the same kinds and shapes, and
                schedulers that are tables.
        """
        self.shares, share = shares, shares[0]
        self.seeds = [seed for each in shares for seed in each.seeds]
        self.guidance, self.conditions = share.job.guidance, share.job.conditions
        self.done, self.is_idle = 0, True
        self.trajectory: list[np.ndarray] = []
        self.latent_shape = share.job.latent_shape
        self.seen: Any = None
        with self.report.part("noise"):
            self.kept_area = kept_areas(shares)
            self.tables = share.tables if len(shares) == 1 else tables_of_images(shares)
            if self.tables is None:
                self.evaluations = len(share.job.sampler.restart(self.seeds))
            else:
                self.evaluations = self.tables.evaluations
                self.first = np.concatenate([each.drawn.first.latents.numpy() for each in shares])
                self.noises = np.concatenate([each.noises() for each in shares], axis=1)
        self.guidance_weights = guidance_weights(shares)
        self.plan = StepPlan.of(self.guidance, self.evaluations)
        told = {
            program: told_of(shares, program.predictions, self.dtype)
            for program in self.plan.programs()
        }
        with self.report.part("host_to_device"):
            self._put(told)
            if self.tables is not None:
                self.state = self._first_state()

    @abstractmethod
    def _put(self, told: Conditions) -> None:
        """Put what `start` prepared where it is computed with."""

    @abstractmethod
    def compile(self) -> None:
        """Compile what the group needs and is not compiled yet."""

    def _first_state(self) -> State:
        """The state before the first step."""
        assert self.tables is not None
        return self._restore(*prepare_state(self.first, self.tables.history), 0)

    @abstractmethod
    def _start_steps(self, state: State, steps: range, program: StepProgram) -> tuple[State, Any]:
        """Start some steps, all by one program; `state` is given away.

        Returns the state after them, and what `_wait_for` waits for.
        """

    @abstractmethod
    def _wait_for(self, done: Any) -> None:
        """Wait until steps that were started are done."""

    @abstractmethod
    def _predict(
        self, model_input: torch.Tensor, timestep: float, program: StepProgram
    ) -> torch.Tensor:
        """One model evaluation, [B, C, h, w] float32 to the same, for a scheduler on the host."""

    @abstractmethod
    def _fetch(self, array: Any) -> np.ndarray:
        """An array of a state on the host; it may change with the state."""

    @abstractmethod
    def _copied(self, latents: Any) -> Any:
        """A state's latents, to be fetched when that has been given away; nobody waits for it."""

    @abstractmethod
    def _restore(self, latents: np.ndarray, history: np.ndarray, step: int) -> State:
        """The state before a step, from what `_fetch` gave."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What the report says of the devices."""

    def compiled_for(self) -> Any:
        """What of it a program serves, where several runs are to be one group."""
        return None

    @abstractmethod
    def profiler(self, folder: Path, steps: range) -> Profiler:
        """A profiler of some steps, whose trace goes to a folder."""

    def flops(self, program: StepProgram) -> float:
        """Of one step on all devices; 0 where they are not counted."""
        return 0.0

    def unguided_in_words(self) -> str | None:
        """What the devices of the other prediction do in steps that have one, where there are."""
        return None

    def warm_up(self, steps: int) -> None:
        """Run steps of each kind on a state of their own."""
        if not steps:
            return
        with self.report.part("warm_up"):
            for program in self.plan.programs():
                if self.tables is None:
                    for _ in range(steps):
                        zeros = torch.zeros(len(self.seeds), *self.latent_shape)
                        self._predict(zeros, 0.0, program)
                else:
                    some = range(min(steps, self.evaluations))
                    self._wait_for(self._start_steps(self._first_state(), some, program)[1])

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
        """The group's state; only while the denoiser is `is_idle`."""
        assert self.is_idle and self.can_resume
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
        pause_after: Collection[int] = (),
        pause: Callable[[], bool] = bool,
        profiler: Profiler | None = None,
        wants_look: Callable[[], bool] | None = None,
    ) -> Iterator[int]:
        """Run all steps that are not `done`, in ranges. Yields the number of steps of each.

        Args:
            keep_after: numbers of steps after which the latents are kept in `trajectory`.
            pause_after: those after which nothing is handed over until the caller asks for more.
            pause: whether to wait after what is handed over already.
            profiler: watches its steps, called one by one.
            wants_look: whether what is handed over now is to be `seen` when it is done; None:
                nobody looks, and a call may have all steps.
        """
        window = range(0) if profiler is None else profiler.steps
        if profiler is not None and window.start == 0:
            profiler.start()
        borders = {*keep_after, *pause_after, window.start, window.stop}
        some = self._run_steps(
            "run", borders, pause, profiler, start=self.done, wants_look=wants_look
        )
        for steps in some:
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

    def _ranges(
        self, start: int, borders: Collection[int], singly: range, *, watched: bool
    ) -> list[range]:
        """The ranges of steps to call from `start` on; those in `singly` one by one."""
        step = self.steps_per_call or (self.evaluations if self.loops_on_device else 1)
        if watched:
            step = min(step, -(-self.evaluations // LEAST_LOOKS))
        if self.tables is None:
            step = 1
        changes = self.plan.changes()
        every = {*range(0, self.evaluations, step), *changes, *borders, *singly, start}
        starts = sorted(i for i in every if start <= i < self.evaluations)
        stops = [*starts[1:], self.evaluations]
        return [range(*ends) for ends in zip(starts, stops, strict=True)] if starts else []

    def _run_steps(
        self,
        part: str,
        borders: Collection[int] = (),
        pause: Callable[[], bool] = bool,
        profiler: Profiler | None = None,
        *,
        start: int = 0,
        wants_look: Callable[[], bool] | None = None,
    ) -> Iterator[range]:
        """Run the steps from `start` on. Yields each range when it is done.

        A range is handed to the devices before the one before it is finished, so that they never
        wait for the host; but none beyond one of `borders`, or after `pause` said so, before all
        are done and the caller asks for more. Then `is_idle` is true.

        Args:
            part: of the report, to count the seconds as; those of profiled steps are `profile`.
        """
        window = range(0) if profiler is None else profiler.steps
        by_tables = self.tables is not None
        advance = self._ahead_by_tables if by_tables else self._ahead_on_host()
        ahead = self.ranges_ahead if by_tables else 0
        # What is there when the steps are done, and what is to be seen then.
        running: deque[tuple[range, Any, str, Any]] = deque()
        ended = time.perf_counter()
        for steps in self._ranges(start, borders, window, watched=wants_look is not None):
            counted = "profile" if steps.start in window else part
            with self.report.part(counted):
                if profiler is not None and steps.start in window:
                    with profiler.step(steps.start):
                        done = advance(steps)
                else:
                    done = advance(steps)
            is_seen = wants_look is not None and wants_look()
            running.append((steps, done, counted, self._to_see() if is_seen else None))
            is_last = steps.stop == self.evaluations
            all_of_them = is_last or steps.stop in borders or pause()
            while running and (all_of_them or len(running) > ahead):
                ended = self._wait(*running[0][:3], since=ended)
                finished, *_, self.seen = running.popleft()
                self.is_idle = not running
                yield finished
                if self.is_idle:  # what the caller did meanwhile is not the next step's
                    ended = time.perf_counter()

    def _wait(self, steps: range, done: Any, part: str, *, since: float) -> float:
        """Wait for a range of steps, and report it. Returns when it ended."""
        with self.report.part(part):
            self._wait_for(done)
        ended = time.perf_counter()
        self.report.count_flops(part, self.flops(self.plan.steps[steps.start]) * len(steps))
        if part == "run" and len(steps) == 1:
            self.report.step_seconds.append(ended - since)
        return ended

    def _ahead_by_tables(self, steps: range) -> Any:
        """Start the next steps. Returns what is there when they are done."""
        program = self.plan.steps[steps.start]
        self.state, done = self._start_steps(self.state, steps, program)
        return done

    def _ahead_on_host(self) -> Callable[[range], Any]:
        """A function that steps the scheduler itself after a model evaluation."""
        (share,) = self.shares
        drawn, sampler = share.draw(), share.job.sampler
        self.state = (drawn.first.latents,)
        timesteps = sampler.restart(self.seeds)
        kept = {name: torch.from_numpy(a) for name, a in self.kept_area.arrays().items()}
        free = free_from(self.evaluations, soft_masks=share.job.soft_masks)

        def advance(steps: range) -> None:
            (i,), (latents,) = steps, self.state
            model_input = sampler.scale_model_input(latents, timesteps[i])
            noise_pred = self._predict(model_input, float(timesteps[i]), self.plan.steps[i])
            latents = sampler.step(noise_pred, timesteps[i], latents, drawn.generators)
            if share.job.keeps_area:
                stays = sampler.noised_after(i, kept["original"], kept["noise"])
                latents = torch.where(kept["masks"] >= float(free[i]), latents, stays)
            self.state = (latents,)

        return advance

    def _to_see(self) -> Any:
        """What `look` fetches; of a scheduler on the host each step makes new latents."""
        latents = self.state[0]
        return latents if self.tables is None else self._copied(latents)

    def look(self, number: int = 0) -> dict[int, np.ndarray]:
        """A share's latents [C, h, w] float32 that were `seen` last, by the images' indices."""
        latents = self.seen.numpy() if self.tables is None else self._fetch(self.seen)
        begin, own = sum(len(each.chosen) for each in self.shares[:number]), self.shares[number]
        some = latents[begin : begin + len(own.chosen)]
        return dict(zip(own.chosen.tolist(), some, strict=True))

    def latents(self) -> np.ndarray:
        """The group's latents [B, C, h, w] float32."""
        if self.tables is None:
            return np.array(self.state[0].numpy())
        with self.report.part("device_to_host"):
            return self._fetch(self.state[0]).copy()
