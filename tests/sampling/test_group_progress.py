"""One group's progress: when it is kept, what stops a run, and what is said of it."""

import signal
from pathlib import Path

import numpy as np
import pytest

from common.files import kept_progress
from common.files.kept_progress import Progress
from common.models.checkpoint import Checkpoint
from common.progress import Shown
from common.sampling.denoiser import Denoiser
from common.sampling.group_progress import GroupProgress
from common.stopping import StoppedError, StopRequest
from tests.sampling.tiny_unet import make_job, open_one, start

STEPS = 5


@pytest.fixture
def denoiser(checkpoint: Checkpoint) -> Denoiser:
    return begin(checkpoint)


def begin(checkpoint: Checkpoint) -> Denoiser:
    """A group before its first step."""
    job = make_job(images_per_prompt=1, steps=STEPS)
    return start(open_one("torch", checkpoint, job), job)


def group_of(
    progress: Progress | None, *, stop: StopRequest | None = None, every: int | None = None
) -> GroupProgress:
    return GroupProgress(progress, stop, every, 3, Shown(STEPS, "denoise", "step"))


def progress_in(folder: Path) -> Progress:
    return Progress(folder, 2, {})


def saved_steps(group: GroupProgress, denoiser: Denoiser) -> list[int]:
    """The steps after which the state was kept, while all steps run."""
    group.resume(denoiser)
    found = []
    pauses = group.pause_after(STEPS)
    for _ in denoiser.run(pause_after=pauses, pause=group.wants_pause):
        group.after_a_range(denoiser)
        assert group.progress is not None
        kept = group.progress.read_steps(group.key)
        if kept is not None and int(kept["step"]) == denoiser.done:
            found.append(denoiser.done)
    return found


def test_where_nothing_is_kept_nothing_is_found(denoiser: Denoiser, tmp_path: Path) -> None:
    group = group_of(None, every=2)
    assert not group.wants_pause() and list(group.pause_after(STEPS)) == []
    group.resume(denoiser)
    for _ in denoiser.run():
        group.after_a_range(denoiser)
    assert list(tmp_path.iterdir()) == []


def test_steps_are_kept_by_their_number(denoiser: Denoiser, tmp_path: Path) -> None:
    assert saved_steps(group_of(progress_in(tmp_path), every=2), denoiser) == [2, 4]


def test_steps_are_kept_by_time(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert saved_steps(group_of(progress_in(tmp_path)), begin(checkpoint)) == []
    monkeypatch.setattr(kept_progress, "SECONDS_BETWEEN_SAVES", 0.0)
    # Not after the last: the group is finished then.
    assert saved_steps(group_of(progress_in(tmp_path)), begin(checkpoint)) == [1, 2, 3, 4]


def test_a_stop_keeps_the_steps_and_the_next_run_goes_on(
    denoiser: Denoiser, checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stop = StopRequest()
    group = group_of(progress_in(tmp_path), stop=stop)
    group.resume(denoiser)
    with pytest.raises(StoppedError) as stopped:
        for _ in denoiser.run(pause=group.wants_pause):
            group.after_a_range(denoiser)
            if denoiser.done == 2:
                stop.number = signal.SIGINT
    assert denoiser.done == 3 and stopped.value.exit_code == 130
    assert "after step 3 of 5, which are kept: the same command goes on" in str(stopped.value)
    again = begin(checkpoint)
    group = group_of(progress_in(tmp_path))
    group.resume(again)
    assert "goes on after step 3 of 5" in capsys.readouterr().out
    assert (again.done, group.shown) == (3, 3)
    np.testing.assert_array_equal(again.latents(), denoiser.latents())


def test_a_stop_where_nothing_is_kept_says_so(denoiser: Denoiser) -> None:
    stop = StopRequest()
    stop.number = signal.SIGTERM
    group = group_of(None, stop=stop)
    group.resume(denoiser)
    said = "after step 1 of 5: the same command begins these images again"
    with pytest.raises(StoppedError, match=said) as stopped:
        for _ in denoiser.run(pause=group.wants_pause):
            group.after_a_range(denoiser)
    assert stopped.value.exit_code == 143
