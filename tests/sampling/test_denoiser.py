"""The driver of the steps: in which ranges they run, what is kept meanwhile, and going on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.compute.kept import Kept
from common.models.checkpoint import Checkpoint
from common.sampling.denoiser import Denoiser
from common.sampling.share import Share
from tests.conftest import LONG
from tests.sampling.tiny_unet import make_job, open_one, run, start

STEPS = 6
BACKENDS = ["torch", "jax"]
Open = Callable[..., Denoiser]


@pytest.fixture(scope="module")
def opened(checkpoint: Checkpoint) -> Open:
    """A backend's denoiser; they share what was loaded and compiled."""
    kept = Kept()

    def open_it(backend: str, **options: Any) -> Denoiser:
        return open_one(backend, checkpoint, make_job(steps=STEPS), kept, **options)

    return open_it


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({}, [1, 1, 1, 1, 1, 1]),
        pytest.param({"steps_per_call": 4}, [4, 2], marks=LONG),
        ({"steps_per_call": 4, "keep_after": [3]}, [3, 1, 2]),
        ({"steps_per_call": 4, "pause_after": [2]}, [2, 2, 2]),
        # Another program runs from the fourth step on.
        ({"steps_per_call": 6, "end": 0.5}, [3, 3]),
    ],
    ids=str,
)
def test_steps_run_in_ranges(
    opened: Open, backend: str, how: dict[str, Any], expected: list[int]
) -> None:
    how = dict(how)
    options = {"steps_per_call": how.pop("steps_per_call")} if "steps_per_call" in how else {}
    guidance = {"end": how.pop("end")} if "end" in how else {}
    denoiser, job = opened(backend, **options), make_job(steps=STEPS, **guidance)
    expected_latents = run(opened(backend), job)
    found = list(start(denoiser, job).run(**how))
    assert found == expected
    assert denoiser.done == STEPS and denoiser.is_idle
    assert len(denoiser.trajectory) == len(how.get("keep_after", []))
    np.testing.assert_allclose(denoiser.latents(), expected_latents, rtol=1e-4, atol=1e-4)


def test_steps_are_handed_over_ahead_unless_a_pause_is_wanted(opened: Open) -> None:
    """Devices never wait for the host; a pause is after all that was handed to them."""
    denoiser, job = opened("jax"), make_job(steps=STEPS)
    idle = [denoiser.is_idle for _ in start(denoiser, job).run()]
    assert idle == [False] * (STEPS - 1) + [True]
    idle = [denoiser.is_idle for _ in start(denoiser, job).run(pause_after=[2])]
    assert idle == [False, True, False, False, False, True]
    idle = [denoiser.is_idle for _ in start(denoiser, job).run(pause=lambda: True)]
    assert all(idle)
    torch = start(opened("torch"), job)
    assert all(torch.is_idle for _ in torch.run())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"steps_per_call": STEPS}], ids=str)
def test_looks_are_at_the_latents_after_each_range_and_change_nothing(
    opened: Open, backend: str, options: dict[str, int]
) -> None:
    """Also where the next range runs by then, to which the state was given."""
    job = make_job(steps=STEPS)
    alone = opened(backend, **options)
    latents = run(alone, job, keep_after=range(1, STEPS + 1))
    denoiser, wanted = start(opened(backend, **options), job), iter([1, 0, 1, 1, 0, 1])
    seen = {}
    for steps in denoiser.run(wants_look=lambda: bool(next(wanted))):
        assert steps == 1
        if denoiser.seen is not None:
            seen[denoiser.done] = denoiser.look()
    np.testing.assert_array_equal(denoiser.latents(), latents)
    assert [*seen] == [1, 3, 4, 6]
    for step, found in seen.items():
        assert [*found] == [0, 1]
        np.testing.assert_array_equal([*found.values()], alone.trajectory[step - 1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scheduler", ["euler", "dpmpp_2m", "euler_a"])
def test_going_on_gives_the_bits_of_a_run_without_a_stop(
    opened: Open, backend: str, scheduler: str
) -> None:
    """From the latents, the history of outputs and the trajectory that were kept."""
    job = make_job(steps=STEPS, scheduler=scheduler, start=0.3)
    whole = opened(backend)
    latents = run(whole, job, keep_after=[2, 5])
    stopped = start(opened(backend), job)
    for _ in stopped.run(keep_after=[2, 5], pause_after=[4]):
        if stopped.done == 4:
            kept = stopped.state_to_keep()
            break
    resumed = start(opened(backend), job)
    resumed.resume(kept)
    assert list(resumed.run(keep_after=[2, 5])) == [1, 1]
    np.testing.assert_array_equal(resumed.latents(), latents)
    np.testing.assert_array_equal(resumed.trajectory, whole.trajectory)


@pytest.mark.parametrize("backend", BACKENDS)
def test_measuring_leaves_the_result_as_it_is(opened: Open, backend: str, tmp_path: Path) -> None:
    job = make_job(steps=STEPS)
    expected = run(opened(backend), job)
    denoiser = start(opened(backend), job)
    denoiser.warm_up(2)
    profiler = denoiser.profiler(tmp_path, range(1, 3))
    for _ in denoiser.run(profiler=profiler):
        pass
    denoiser.repeat(2)
    np.testing.assert_array_equal(denoiser.latents(), expected)
    report = denoiser.report
    assert len(report.repeats) == 2
    assert len(report.step_seconds) == STEPS - 2  # without those that are profiled
    assert {"warm_up", "run", "repeats", "profile"} <= report.parts().keys()
    assert profiler.result().steps == (1, 3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scheduler", ["euler", "heun", "euler_a"])
def test_a_scheduler_on_the_host_equals_its_tables(
    opened: Open, backend: str, scheduler: str
) -> None:
    job = make_job(scheduler=scheduler, steps=3, end=0.7)
    by_tables = run(opened(backend), job)
    denoiser = opened(backend)
    denoiser.start(Share(job, np.arange(len(job.seeds)), None))
    denoiser.compile()
    assert not denoiser.can_resume
    denoiser.warm_up(1)
    seen, ranges = [], []
    for steps in denoiser.run(keep_after=[2], wants_look=lambda: True):
        ranges.append(steps)
        seen.append([*denoiser.look().values()])
    np.testing.assert_array_equal(seen[-1], denoiser.latents())
    np.testing.assert_array_equal(seen[1], denoiser.trajectory[0])
    assert ranges == [1] * len(job.sampler.restart())
    np.testing.assert_allclose(denoiser.latents(), by_tables, rtol=1e-4, atol=1e-4)
    assert len(denoiser.trajectory) == 1
