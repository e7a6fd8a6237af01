"""All images of a run, in groups: each is diffusers' image, whatever is kept and gone on from."""

import signal
from pathlib import Path
from typing import Any

import pytest

from common.compute.kept import Kept
from common.compute.options import RunOptions
from common.files.kept_progress import Progress
from common.files.made_rows import MadeRows
from common.models.checkpoint import Checkpoint
from common.sampling.denoising import Denoised, denoise_images, steps_to_keep
from common.sampling.job import DenoisingJob
from common.stopping import StoppedError, StopRequest
from tests.conftest import LONG
from tests.sampling.tiny_unet import (
    ROUNDING,
    denoise_by_diffusers,
    make_job,
    open_one,
    relative_difference,
    steps_by_diffusers,
)

STEPS = 5
KEPT = Kept()  # weights and programs, which all tests share


def denoise(
    backend: str, checkpoint: Checkpoint, job: DenoisingJob, **options: Any
) -> tuple[Denoised, int]:
    """Latents of all images, and how many steps ran for them."""
    folder, progress, stop = (options.pop(n, None) for n in ("profile_folder", "progress", "stop"))
    denoiser = open_one(backend, checkpoint, job, KEPT)
    found = denoise_images(
        lambda _: denoiser,
        [job],
        RunOptions(mesh="single", **options),
        MadeRows.numbered(len(job.seeds), progress),
        profile_folder=folder,
        stop=stop,
    )
    return found, len(denoiser.report.step_seconds)


@pytest.mark.parametrize("backend", ["torch", pytest.param("jax", marks=LONG)])
def test_images_in_groups_are_those_of_diffusers(checkpoint: Checkpoint, backend: str) -> None:
    """Two prompts' images; the last group repeats one to be full."""
    job = make_job(prompts=2, images_per_prompt=2, scheduler="euler_a", steps=STEPS)
    for batch_size, groups in ((3, 2), (8, 1)):
        found, steps = denoise(backend, checkpoint, job, batch_size=batch_size)
        assert found.latents.shape == (4, *job.latent_shape) and steps == groups * STEPS
        assert found.trajectory is None and found.kept_after == [] and found.profile is None
        for index in range(4):
            expected = denoise_by_diffusers(checkpoint, job, index)
            assert relative_difference(found.latents[index].numpy(), expected) < ROUNDING


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_a_trajectory_holds_what_diffusers_has_after_its_steps(
    checkpoint: Checkpoint, backend: str
) -> None:
    """In all groups; the last are the run's latents, which are the same without it."""
    job = make_job(images_per_prompt=3, steps=STEPS)
    found, _ = denoise(backend, checkpoint, job, batch_size=2, save_trajectory=2)
    plain, _ = denoise(backend, checkpoint, job, batch_size=2)
    assert found.latents.equal(plain.latents)
    assert found.trajectory is not None and found.kept_after == [2, 4, 5]
    assert found.trajectory.shape == (3, 3, *job.latent_shape)
    assert found.trajectory[-1].equal(found.latents)
    for index in range(3):
        steps = list(steps_by_diffusers(checkpoint, job, index))
        for number, latents in zip(found.kept_after, found.trajectory[:, index], strict=True):
            assert relative_difference(latents.numpy(), steps[number - 1]) < ROUNDING


@pytest.mark.parametrize(
    ("evaluations", "every", "expected"),
    [
        (6, None, []),
        (6, 1, [1, 2, 3, 4, 5, 6]),
        (6, 4, [4, 6]),
        (6, 3, [3, 6]),
        (6, 9, [6]),
        (1, 1, [1]),
    ],
)
def test_the_last_latents_are_always_kept(
    evaluations: int, every: int | None, expected: list[int]
) -> None:
    assert steps_to_keep(evaluations, every) == expected


def progress_in(folder: Path, **facts: Any) -> Progress:
    return Progress(folder, 2, {"steps": STEPS, **facts})


def stopping() -> StopRequest:
    """A signal that has come already: the run stops when what it runs is kept."""
    stop = StopRequest()
    stop.number = signal.SIGTERM
    return stop


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_a_run_that_is_stopped_again_and_again_gives_the_bits_of_one(
    checkpoint: Checkpoint, backend: str, tmp_path: Path
) -> None:
    job = make_job(images_per_prompt=3, scheduler="euler_a", steps=STEPS)
    options: dict[str, Any] = {"batch_size": 2, "checkpoint_every": 2, "save_trajectory": 2}
    expected, steps = denoise(backend, checkpoint, job, **options)
    assert steps == 2 * STEPS
    for _ in range(STEPS + 2):  # each does one step more
        progress, stop = progress_in(tmp_path), stopping()
        with pytest.raises(StoppedError, match="the same command goes on from there"):
            denoise(backend, checkpoint, job, progress=progress, stop=stop, **options)
    found, steps = denoise(backend, checkpoint, job, progress=progress_in(tmp_path), **options)
    assert steps == STEPS - 2  # of the second group, those that were not kept
    assert found.latents.equal(expected.latents)
    assert found.trajectory is not None and expected.trajectory is not None
    assert found.trajectory.equal(expected.trajectory)


def test_steps_go_on_in_a_group_of_the_same_shape_alone(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    job = make_job(images_per_prompt=1, steps=STEPS)
    options: dict[str, Any] = {"batch_size": 2, "checkpoint_every": 2}
    with pytest.raises(StoppedError):
        denoise(
            "torch", checkpoint, job, progress=progress_in(tmp_path), stop=stopping(), **options
        )
    options["fill_groups"] = True
    found, steps = denoise("torch", checkpoint, job, progress=progress_in(tmp_path), **options)
    assert steps == STEPS and found.latents.shape[0] == 1


def test_a_run_goes_on_from_its_own_progress_alone(checkpoint: Checkpoint, tmp_path: Path) -> None:
    job = make_job(images_per_prompt=2, steps=STEPS)
    options: dict[str, Any] = {"batch_size": 1, "checkpoint_every": 2}
    with pytest.raises(StoppedError):
        denoise(
            "torch", checkpoint, job, progress=progress_in(tmp_path), stop=stopping(), **options
        )
    others = progress_in(tmp_path, fingerprint="of another recipe")
    assert denoise("torch", checkpoint, job, progress=others, **options)[1] == 2 * STEPS


def test_only_the_first_group_is_measured(checkpoint: Checkpoint, tmp_path: Path) -> None:
    job = make_job(images_per_prompt=3, steps=STEPS)
    denoiser = open_one("torch", checkpoint, job)
    options = RunOptions(batch_size=1, repeat=2, warmup_steps=1, profile_steps=(1, 3))
    made = MadeRows.numbered(len(job.seeds))
    found = denoise_images(lambda _: denoiser, [job], options, made, profile_folder=tmp_path)
    assert found.profile is not None and found.profile.steps == (1, 3)
    assert len(denoiser.report.repeats) == 2
    assert len(denoiser.report.step_seconds) == 3 * STEPS - 2
    expected, _ = denoise("torch", checkpoint, job, batch_size=1)
    assert found.latents.equal(expected.latents)


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_a_scheduler_that_is_not_linear_steps_on_the_host(
    checkpoint: Checkpoint,
    backend: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    job = make_job(scheduler="ddim", steps=STEPS)
    job.sampler.scheduler.register_to_config(clip_sample=True, clip_sample_range=1.0)
    found, _ = denoise(backend, checkpoint, job, checkpoint_every=2, progress=progress_in(tmp_path))
    said = capsys.readouterr()
    assert "DDIMScheduler steps on the host between model evaluations" in said.out
    assert "--checkpoint_every has no effect: DDIMScheduler steps on the host" in said.err
    for index in range(2):
        expected = denoise_by_diffusers(checkpoint, job, index)
        assert relative_difference(found.latents[index].numpy(), expected) < ROUNDING
