"""What is accepted as a job, and who waits for it."""

import asyncio
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from common.errors import BadSettingError, UnfitEnvironmentError
from common.serving.job_queue import JobQueue
from common.serving.jobs import Caller, Job, State, Step
from common.serving.service import Bounds, Service, ShuttingDownError, without_paths
from tests.refusals import refusal


def test_a_job_is_a_run_directory_of_its_own(tmp_path: Path) -> None:
    service = Service(tmp_path / "jobs", {"height": 64, "width": 64, "mesh": "single"})

    async def submit() -> list[Job]:
        return [await service.submit({"prompt": ["a"], "seed": seed}) for seed in (1, 2)]

    first, second = asyncio.run(submit())
    service.close()
    assert first.run_dir != second.run_dir and first.run_dir.parent == second.run_dir.parent
    assert [step.stage for step in first.steps] == [1, 2, 3]
    assert "--seed=1" in first.steps[0].arguments and "--mesh=single" in first.steps[1].arguments
    assert f"--output_dir={first.run_dir}" in first.steps[2].arguments


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"height": 4096, "width": 4096}, "16777216 pixels are more than"),
        ({"height": 4096}, "16777216 pixels are more than"),
        ({"num_inference_steps": 151}, "151 steps are more than the 150"),
        ({"num_images_per_prompt": 11}, "11 images are more than the 10"),
        ({"colour": "red"}, "--colour: no stage from 1 to 3 takes it"),
    ],
    ids=str,
)
def test_what_is_too_much_is_refused(tmp_path: Path, flags: dict[str, object], said: str) -> None:
    service = Service(tmp_path / "jobs", {}, Bounds())
    with refusal(BadSettingError, said):
        asyncio.run(service.submit(flags))
    service.close()


def test_jobs_that_ended_go_where_not_all_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first ones go, with their folders; what waits, and what has only ended, stays."""
    service = Service(tmp_path / "jobs", {}, Bounds(kept=2))
    monkeypatch.setattr("common.serving.service.SECONDS_UNTIL_FORGOTTEN", 0.0)

    async def forget(until: int) -> set[Path]:
        looking = asyncio.create_task(service.forget_old())
        for _ in range(500):
            await asyncio.sleep(0.02)
            if len([*(tmp_path / "jobs" / "runs").iterdir()]) <= until:
                break
        service.ends = True
        await looking
        service.ends = False
        return set((tmp_path / "jobs" / "runs").iterdir())

    async def all_of_it() -> None:
        jobs = [await service.submit({"prompt": ["a"], "seed": seed}) for seed in range(6)]
        for job in jobs:
            job.run_dir.mkdir()
        for job in reversed(jobs[:4]):  # those of more than the last two ended first
            await service.cancel(job)
        left = [jobs[0], jobs[1], *jobs[4:]]
        assert await forget(4) == {job.run_dir for job in left}
        assert {job.number for job in await service.jobs()} == {job.number for job in left}
        assert await forget(4) == {job.run_dir for job in left}
        monkeypatch.setattr("common.serving.service.SECONDS_UNTIL_FORGOTTEN", 60.0)
        await service.cancel(jobs[4])
        assert await forget(4) == {job.run_dir for job in left}

    asyncio.run(all_of_it())
    service.close()


def encoded(width: int, height: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(data, "PNG")
    return data.getvalue()


def test_pictures_of_a_request_are_files_of_its_run_directory(tmp_path: Path) -> None:
    service = Service(tmp_path / "jobs", {})
    given = {"image": encoded(64, 48), "mask_image": encoded(32, 24)}
    job = asyncio.run(service.submit({"prompt": ["a"]}, pictures=given))
    service.close()
    assert [step.stage for step in job.steps] == [1, 0, 2, 3]
    for flag, data in given.items():
        path = job.run_dir / "given" / flag
        assert path.read_bytes() == data and f"--{flag}={path}" in job.steps[0].arguments


@pytest.mark.parametrize(
    ("flags", "data", "said"),
    [
        ({}, b"GIF89a", "image is no PNG, JPEG or WebP"),
        ({}, encoded(64, 64)[:80], "image is damaged"),
        ({}, encoded(200, 101), "20200 pixels are more than the 20000 that are allowed"),
        ({"width": 300}, encoded(200, 99), "29700 pixels are more than the 20000"),
        ({"width": 64, "height": 64}, encoded(200, 201), "more than the 40000 that are allowed"),
    ],
    ids=["gif", "cut", "large", "wide", "many_pixels"],
)
def test_pictures_of_no_use_leave_nothing(
    tmp_path: Path, flags: dict[str, object], data: bytes, said: str
) -> None:
    service = Service(tmp_path / "jobs", {}, Bounds(pixels=20_000, given_pixels=40_000))
    with refusal(BadSettingError, said):
        asyncio.run(service.submit(flags, pictures={"image": data}))
    service.close()
    assert not [*(tmp_path / "jobs" / "runs").iterdir()]


def test_who_waits_hears_of_the_end(tmp_path: Path) -> None:
    service = Service(tmp_path / "jobs", {})

    async def wait() -> Job:
        watching = asyncio.create_task(service.watch())
        job = await service.submit({"prompt": ["a"]})
        waiting = asyncio.create_task(service.wait_for(job))
        other = JobQueue(tmp_path / "jobs")
        mine = other.claim([1], "w")
        assert mine is not None
        await asyncio.sleep(0.1)
        assert not waiting.done()
        other.end(mine, 4, "not finite")
        found = await asyncio.wait_for(waiting, 10)
        service.ends = True
        await asyncio.wait_for(watching, 10)
        return found

    found = asyncio.run(wait())
    service.close()
    assert (found.state, found.exit_code, found.error) == (State.FAILED, 4, "not finite")


def test_who_waits_hears_of_a_cancel(tmp_path: Path) -> None:
    """Which comes by the same connection to the queue."""
    service = Service(tmp_path / "jobs", {})

    async def wait() -> Job:
        watching = asyncio.create_task(service.watch())
        job = await service.submit({"prompt": ["a"]})
        waiting = asyncio.create_task(service.wait_for(job))
        await asyncio.sleep(0.1)
        await service.cancel(job)
        found = await asyncio.wait_for(waiting, 10)
        service.ends = True
        await asyncio.wait_for(watching, 10)
        return found

    assert asyncio.run(wait()).state is State.CANCELLED
    service.close()


def test_a_job_of_its_own_kind_has_what_was_prepared(tmp_path: Path) -> None:
    service = Service(tmp_path / "jobs", {"height": 64})

    def prepare(run_dir: Path, flags: Mapping[str, Any]) -> list[Step]:
        run_dir.mkdir()
        (run_dir / "given").write_text(str(flags["height"]))
        return [Step(3, ["work"])]

    def fail(run_dir: Path, _: Mapping[str, Any]) -> list[Step]:
        run_dir.mkdir()
        raise BadSettingError("no")

    job = asyncio.run(service.submit_own(prepare))
    assert job.steps == [Step(3, ["work"])] and (job.run_dir / "given").read_text() == "64"
    with refusal(BadSettingError, "no"):
        asyncio.run(service.submit_own(fail))
    service.close()
    assert [*job.run_dir.parent.iterdir()] == [job.run_dir]


def test_after_a_look_that_failed_there_is_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, failed = Service(tmp_path / "jobs", {}), list[int]()
    look = service._queue.states

    def states(numbers: list[int]) -> dict[int, State]:
        if not failed:
            failed.append(1)
            raise UnfitEnvironmentError("the disk is full")
        return look(numbers)

    monkeypatch.setattr(service._queue, "states", states)

    async def wait() -> Job:
        job = await service.submit({"prompt": ["a"]})
        await service.cancel(job)  # nothing more happens to the file
        watching = asyncio.create_task(service.watch())
        found = await asyncio.wait_for(service.wait_for(job), 10)
        service.ends = True
        await watching
        return found

    assert asyncio.run(wait()).state is State.CANCELLED and failed
    service.close()


def test_jobs_of_run_all_are_not_those_of_requests(tmp_path: Path) -> None:
    service, queue = Service(tmp_path / "jobs", {}), JobQueue(tmp_path / "jobs")
    queue.add(tmp_path / "mine", [Step(1, [])], caller=Caller("/", ""))

    async def look() -> None:
        job = await service.submit({"prompt": ["a"]})
        assert [each.number for each in await service.unfinished()] == [job.number]
        assert [each.number for each in await service.jobs()] == [job.number]

    asyncio.run(look())
    service.close()


def test_where_the_server_ends_those_who_wait_are_told(tmp_path: Path) -> None:
    service = Service(tmp_path / "jobs", {})

    async def wait() -> None:
        watching = asyncio.create_task(service.watch())
        job = await service.submit({"prompt": ["a"]})
        waiting = asyncio.create_task(service.wait_for(job))
        await asyncio.sleep(0.05)
        service.ends = True
        await asyncio.wait_for(watching, 10)
        with refusal(ShuttingDownError, f"job {job.run_dir.name} is kept, and goes on"):
            await asyncio.wait_for(waiting, 10)
        with refusal(ShuttingDownError, "the server is shutting down"):
            await service.submit({"prompt": ["b"]})

    asyncio.run(wait())
    service.close()
    queue = JobQueue(tmp_path / "jobs")
    assert [job.state for job in queue.jobs()] == [State.WAITING]


def test_sentences_without_folders() -> None:
    assert without_paths("/a/b c/d.png is damaged") == "b c/d.png is damaged"
    assert without_paths("--output_dir /home/x/jobs/runs/12ab: no") == "--output_dir 12ab: no"
    assert without_paths("give 1/255, a/b and and/or") == "give 1/255, a/b and and/or"
