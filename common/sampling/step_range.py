"""Which of a schedule's steps are taken: all, those after some noise is gone, those up to a cut.

Cuts are those of diffusers' image-to-image pipelines (`get_timesteps`) and of its ensembles of
experts (`denoising_start`, `denoising_end`), made at whole steps: a run that is cut in two takes
the steps of the run in one. diffusers itself tears the steps of second-order schedulers and PNDM's
first step apart.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from common.errors import BadSettingError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Cut:
    """What is taken of a schedule."""

    timesteps: "torch.Tensor"  # one for each model evaluation
    first: int = 0  # index of the first of them
    following: "torch.Tensor | None" = None  # the one after them [1]; none where all noise is gone


@dataclass(frozen=True, kw_only=True)
class StepRange:
    """A part of a schedule's steps, in the words of diffusers' pipelines."""

    strength: float | None = None  # of the noise that is added; the last steps are taken
    denoising_start: float | None = None  # from this share of the training timesteps on
    denoising_end: float | None = None  # up to this share

    @property
    def adds_noise(self) -> bool:
        """Whether given latents are noised: those of a run that was cut hold their noise."""
        return self.denoising_start is None

    def cut(self, scheduler: Any) -> "Cut":
        """What is taken of a schedule.

        Args:
            scheduler: diffusers', its timesteps set.

        Raises:
            BadSettingError: nothing is left, or the scheduler cannot begin in the middle.
        """
        timesteps: torch.Tensor = scheduler.timesteps
        if self == StepRange():
            return Cut(timesteps=timesteps)
        steps = first_timesteps(scheduler)
        first, end = self._first_step(steps, scheduler), self._end_step(steps, scheduler)
        if first >= end:
            raise BadSettingError(
                f"{self.in_words()} leaves none of the {len(steps)} steps: choose another value, "
                "or more --num_inference_steps"
            )
        if is_plms(scheduler):
            # The first step is two evaluations, the second one a timestep early.
            own = steps[first:end]
            second = own[1:2] if len(own) > 1 else own[:0]
            taken = timesteps.new_tensor([*own[:2], *second, *own[2:]])
            return Cut(timesteps=taken, following=steps[end : end + 1])
        begin, stop = first * int(scheduler.order), end * int(scheduler.order)
        return Cut(
            timesteps=timesteps[begin:stop], first=begin, following=timesteps[stop : stop + 1]
        )

    def _first_step(self, steps: "torch.Tensor", scheduler: Any) -> int:
        if self.denoising_start is not None:
            return _step_at(self.denoising_start, steps, scheduler)
        if self.strength is not None:
            # As diffusers computes it: 50 times 0.58 are 28.
            return len(steps) - min(int(len(steps) * self.strength), len(steps))
        return 0

    def _end_step(self, steps: "torch.Tensor", scheduler: Any) -> int:
        if self.denoising_end is None:
            return len(steps)
        return _step_at(self.denoising_end, steps, scheduler)

    def in_words(self) -> str:
        """The flags that make it."""
        given = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return " ".join(f"--{name} {value}" for name, value in given.items() if value is not None)


def first_timesteps(scheduler: Any) -> "torch.Tensor":
    """The timestep at which each step begins, of schedulers that evaluate once or twice a step."""
    timesteps: torch.Tensor = scheduler.timesteps
    if is_plms(scheduler):
        return timesteps[[0, *range(2, len(timesteps))]] if len(timesteps) > 1 else timesteps
    if type(scheduler).__name__ == "PNDMScheduler":
        raise BadSettingError(
            "PNDMScheduler with Runge–Kutta steps (skip_prk_steps false) begins and ends whole: "
            "choose another --scheduler, or --scheduler_option skip_prk_steps=true"
        )
    return timesteps[:: int(scheduler.order)]


def is_plms(scheduler: Any) -> bool:
    """Whether it is PNDM without Runge–Kutta steps, whose first step is two evaluations."""
    return type(scheduler).__name__ == "PNDMScheduler" and scheduler.config.skip_prk_steps


def _step_at(share: float, steps: "torch.Tensor", scheduler: Any) -> int:
    """The first step of the part from a share of the training timesteps on, as `get_timesteps`.

    Of schedulers with two evaluations that is the step that the cut is in.
    """
    if type(scheduler).__name__ == "EDMEulerScheduler":
        raise BadSettingError(
            "--denoising_start and --denoising_end are shares of training timesteps, and "
            "EDMEulerScheduler has none: choose another --scheduler"
        )
    count = scheduler.config.num_train_timesteps
    cutoff = round(count - share * count)
    if scheduler.order == 1:
        return int((steps >= cutoff).sum())
    evaluations = int((scheduler.timesteps < cutoff).sum())
    evaluations += evaluations % 2 == 0
    return (len(scheduler.timesteps) - evaluations) // 2
