"""The program of each step follows from what the step predicts."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from common.conditions.base import CONDITIONAL, UNCONDITIONAL
from common.sampling.guidance import Guidance
from common.sampling.step_plan import StepPlan, StepProgram

GUIDED, ALONE = StepProgram((UNCONDITIONAL, CONDITIONAL)), StepProgram((CONDITIONAL,))


def test_guidance_in_some_steps_is_a_plan_of_two_programs() -> None:
    plan = StepPlan.of(Guidance(scale=5.0, start=0.2, end=0.6), 10)
    assert plan.steps == (ALONE,) * 2 + (GUIDED,) * 4 + (ALONE,) * 4
    assert plan.programs() == [ALONE, GUIDED]
    assert plan.fullest() == GUIDED
    assert plan.changes() == [2, 6]
    assert [program.kind for program in plan.programs()] == ["conditional", "guided"]


def test_a_plan_of_one_program_never_changes() -> None:
    for guidance, program in ((Guidance(scale=5.0), GUIDED), (Guidance(scale=1.0), ALONE)):
        plan = StepPlan.of(guidance, 3)
        assert plan.programs() == [program] and plan.changes() == []
        assert plan.fullest() == program


@given(
    scale=st.sampled_from([1.0, 3.0]),
    ends=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    evaluations=st.integers(1, 70),
)
def test_between_two_changes_one_program_runs(
    scale: float, ends: tuple[float, float], evaluations: int
) -> None:
    guidance = Guidance(scale=scale, start=min(ends), end=max(ends))
    plan = StepPlan.of(guidance, evaluations)
    borders = [0, *plan.changes(), evaluations]
    ranges = [plan.steps[i:j] for i, j in pairwise(borders)]
    assert [len(set(steps)) for steps in ranges] == [1] * len(ranges)
    assert all(a[0] != b[0] for a, b in pairwise(ranges))
    for i, program in enumerate(plan.steps):
        assert program.predictions == guidance.predictions(i, evaluations)
    assert set(plan.steps) == set(plan.programs())
