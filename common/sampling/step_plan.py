"""The plan of a run's steps: for each model evaluation the program that it runs."""

from dataclasses import dataclass
from typing import Self

from common.sampling.guidance import Guidance


@dataclass(frozen=True)
class StepProgram:
    """What a program computes in one step, besides the shapes that it is compiled for."""

    predictions: tuple[str, ...]  # of each image, which lie beside each other in the UNet's batch

    @property
    def kind(self) -> str:
        """Its name in reports and traces."""
        return "guided" if len(self.predictions) > 1 else "conditional"


@dataclass(frozen=True)
class StepPlan:
    """The program of each model evaluation, in their order."""

    steps: tuple[StepProgram, ...]

    @classmethod
    def of(cls, guidance: Guidance, evaluations: int) -> Self:
        """That of a run with so many model evaluations."""
        return cls(
            tuple(StepProgram(guidance.predictions(i, evaluations)) for i in range(evaluations))
        )

    def programs(self) -> list[StepProgram]:
        """All that are needed, those with the fewest predictions first."""
        return sorted(set(self.steps), key=lambda program: len(program.predictions))

    def fullest(self) -> StepProgram:
        """The one that computes the most."""
        return self.programs()[-1]

    def changes(self) -> list[int]:
        """The steps from which on another program runs than before."""
        return [i for i in range(1, len(self.steps)) if self.steps[i] != self.steps[i - 1]]
