"""Runs that wait for each other: what becomes a group, and what does not."""

import threading

import numpy as np
import pytest

from common.compute.kept import Kept
from common.models.checkpoint import Checkpoint
from common.progress import Shown
from common.sampling import together
from common.sampling.denoiser import Denoiser
from common.sampling.job import DenoisingJob
from common.sampling.scheduler_tables import make_tables
from common.sampling.share import Share
from common.sampling.together import DenoisedTogether, Seat, Together
from tests.sampling.tiny_unet import ROUNDING, make_job, open_one, run, save_unet


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return save_unet(tmp_path_factory.mktemp("unet"))


def share_of(job: DenoisingJob) -> Share:
    return Share(job, np.arange(len(job.seeds)), make_tables(job.sampler))


def at_once(
    checkpoint: Checkpoint, *jobs: DenoisingJob | None, backend: str = "jax"
) -> "tuple[list[DenoisedTogether | None], list[Denoiser]]":
    """What each run gets, None also for one that does not come; and the denoisers."""
    kept, found = Kept(), dict[int, DenoisedTogether | None]()
    denoisers: list[Denoiser] = []

    def go(number: int, job: DenoisingJob | None, seat: Seat) -> None:
        with seat.turn():
            if job is None:
                return
            denoiser = open_one(backend, checkpoint, job, kept)
            denoisers.append(denoiser)
            share = share_of(job)
            bar = Shown(len(job.sampler.restart()), "denoise", "step")
            found[number] = seat.denoise(denoiser, share, bar)
            assert bar.done == (0 if found[number] is None else bar.total)
            assert seat.denoise(denoiser, share, bar) is None  # it has had its turn

    seats = Together(len(jobs)).seats()
    threads = [
        threading.Thread(target=go, args=(k, job, seat), daemon=True)
        for k, (job, seat) in enumerate(zip(jobs, seats, strict=True))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    return [found.get(k) for k in range(len(jobs))], denoisers


def test_runs_that_one_program_serves_are_a_group(checkpoint: Checkpoint) -> None:
    one = make_job(images_per_prompt=2, steps=3, seed=1)
    other = make_job(images_per_prompt=1, steps=5, seed=2, scheduler="ddim")
    unguided = make_job(images_per_prompt=1, steps=3, seed=3, scale=1.0)
    wide = make_job(images_per_prompt=1, steps=3, seed=3, shape=(4, 8, 16))
    (first, second, *rest), denoisers = at_once(checkpoint, one, other, None, unguided, wide)
    assert rest == [None, None, None]  # nobody is like them
    for job, found, others in ((one, first, 1), (other, second, 2)):
        assert found is not None and (found.group_size, found.others) == (4, others)
        expected = run(open_one("jax", checkpoint, job), job)
        np.testing.assert_allclose(found.latents, expected, ROUNDING, ROUNDING)
        assert found.seconds > 0
    programs = {id(program) for denoiser in denoisers for program in denoiser.programs.values()}
    assert len(programs) == 1


def test_what_has_two_programs_or_steps_on_the_host_is_done_alone(checkpoint: Checkpoint) -> None:
    interval = make_job(steps=4, start=0.5)
    found, _ = at_once(checkpoint, interval, interval)
    assert found == [None, None]
    found, _ = at_once(checkpoint, make_job(), make_job(), backend="torch")
    assert found == [None, None]
    (denoiser,) = at_once(checkpoint, make_job())[1]
    seat = Together(1).seats()[0]
    bar = Shown(4, "denoise", "step")
    assert seat.denoise(denoiser, Share(make_job(), np.arange(2), None), bar) is None


def test_what_fails_at_once_is_left_to_each(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(together, "_denoise_as_one", fail)
    found, _ = at_once(checkpoint, make_job(seed=1), make_job(seed=2))
    assert found == [None, None]
    said = capsys.readouterr().err
    assert "2 runs are denoised one by one" in said and "out of memory" in said


def test_what_ends_one_of_them_leaves_the_others(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That thread ends, and the other one's images are for it to denoise."""
    ended = list[object]()

    class EndedError(BaseException):
        pass

    def end(group: object) -> None:
        ended.append(group)
        raise EndedError

    monkeypatch.setattr(together, "_denoise_as_one", end)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # its end is meant
    found, _ = at_once(checkpoint, make_job(seed=1), make_job(seed=2))
    assert found == [None, None] and len(ended) == 1
