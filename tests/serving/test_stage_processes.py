"""Processes that stay: what they make, and what becomes of jobs when one dies or is stopped."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from common.errors import BadSettingError
from common.files.picture_files import read_picture_record, read_pixels
from common.files.report import read_report
from common.files.stage_table import LAST
from common.runs.in_turn import plan
from common.serving.job_queue import WORKERS_FOLDER, JobQueue
from common.serving.jobs import Job, State, Step
from common.serving.stage_processes import Group, StageProcesses, groups_of
from tests.conftest import Run
from tests.refusals import refusal

pytestmark = pytest.mark.slow

SMALL = {"height": 64, "width": 64, "num_inference_steps": 2, "mesh": "single"}
PICTURE = "output_image.png"


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StageProcesses]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("XLA_FLAGS", raising=False)  # as the scripts that they are compared with
        with StageProcesses(tmp_path_factory.mktemp("serving") / "jobs", groups_of()) as found:
            yield found


def steps_for(run_dir: Path, **flags: object) -> list[Step]:
    """As `run_all.sh` would run them."""
    commands = plan({"output_dir": run_dir, **SMALL, **flags})
    return [Step(stage.number, command[2:]) for stage, command in commands.items()]


def wait_for_step(queue: JobQueue, number: int, stage: int) -> Job:
    """Until a job's stage runs, and has done something."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        job = queue.get(number)
        if job is not None and job.state is State.RUNNING and job.step.stage == stage:
            return job
        time.sleep(0.01)
    raise AssertionError("it does not come")


def wait_for(path: Path) -> None:
    until = time.monotonic() + 60
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.01)
    assert path.exists()


def test_a_run_is_as_by_the_scripts_and_the_next_one_is_warm(
    processes: StageProcesses, tmp_path: Path, quick_stage: Run
) -> None:
    first, second, by_scripts = (tmp_path / name for name in ("first", "second", "scripts"))
    assert processes.do(first, steps_for(first, prompt="a red star")) == (0, "")
    assert processes.are_ready()
    assert processes.do(second, steps_for(second, prompt="a blue ring", seed=3)) == (0, "")
    report = read_report(second, 2)
    assert report is not None and report.programs is None  # all were there
    for step in steps_for(by_scripts, prompt="a blue ring", seed=3):
        if step.stage != 0:
            assert quick_stage(step.stage, *step.arguments).returncode == 0
    assert np.array_equal(read_pixels(second / PICTURE), read_pixels(by_scripts / PICTURE))
    found, expected = (read_picture_record(d / PICTURE) for d in (second, by_scripts))
    assert found is not None and expected is not None
    assert found["fingerprint"] == expected["fingerprint"]


def test_a_run_that_fails_says_why_and_the_next_one_runs(
    processes: StageProcesses, tmp_path: Path
) -> None:
    code, error = processes.do(tmp_path / "bad", steps_for(tmp_path / "bad", height=63))
    assert code == 2 and "--height 63 is not a multiple of 8" in error
    code, error = processes.do(tmp_path / "x", [Step(2, [f"--output_dir={tmp_path / 'x'}"])])
    assert code == 3 and "generation_config.json is missing" in error
    good = tmp_path / "good"
    assert processes.do(good, steps_for(good)) == (0, "") and (good / PICTURE).exists()


# Four groups of so many steps that a signal finds one of them at work.
LONG = {"num_images_per_prompt": 4, "batch_size": 1, "num_inference_steps": 150}


def test_what_a_killed_process_was_at_goes_on(
    processes: StageProcesses, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, killed = tmp_path / "run", list[int]()
    number = len(processes.queue.jobs()) + 1

    def kill() -> None:
        queue = JobQueue(processes.queue.folder)
        job = wait_for_step(queue, number, 2)
        wait_for(run_dir / "stage2_progress")
        said = queue.folder / WORKERS_FOLDER / f"{job.worker}.json"
        killed.append(json.loads(said.read_text())["pid"])
        os.kill(killed[0], signal.SIGKILL)
        queue.close()

    thread = threading.Thread(target=kill)
    thread.start()
    assert processes.do(run_dir, steps_for(run_dir, **LONG)) == (0, "")
    thread.join()
    assert killed and (run_dir / "output_grid.png").exists()
    job = processes.queue.get(number)
    assert job is not None and job.state is State.DONE
    said = capsys.readouterr().out
    assert "ended with -9: it is begun again" in said
    report = read_report(run_dir, 2)
    assert report is not None and report.shapes["latents"][0] == 4


def test_a_cancelled_run_ends_and_keeps_what_it_has(
    processes: StageProcesses, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    number = len(processes.queue.jobs()) + 1

    def cancel() -> None:
        queue = JobQueue(processes.queue.folder)
        wait_for_step(queue, number, 2)
        wait_for(run_dir / "stage2_progress")
        queue.cancel(number)
        queue.close()

    thread = threading.Thread(target=cancel)
    thread.start()
    code, error = processes.do(run_dir, steps_for(run_dir, **LONG))
    thread.join()
    assert code == 130 and "which are kept" in error
    job = processes.queue.get(number)
    assert job is not None and job.state is State.CANCELLED
    other = tmp_path / "other"  # which the same process does
    assert processes.do(other, steps_for(other)) == (0, "")


def test_two_runs_follow_each_other_through_the_stages(
    processes: StageProcesses, tmp_path: Path
) -> None:
    """By two who ask at once."""
    ended: dict[str, tuple[int, str]] = {}

    def ask(name: str) -> None:
        queue = JobQueue(processes.queue.folder)
        job = queue.add(tmp_path / name, steps_for(tmp_path / name, prompt=name))
        while not job.has_ended:
            time.sleep(0.02)
            found = queue.get(job.number)
            assert found is not None
            job = found
        ended[name] = job.exit_code or 0, job.error
        queue.close()

    threads = [threading.Thread(target=ask, args=(name,)) for name in ("a ring", "a star")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert ended == {"a ring": (0, ""), "a star": (0, "")}
    assert (tmp_path / "a ring" / PICTURE).exists() and (tmp_path / "a star" / PICTURE).exists()


def test_a_process_that_refuses_its_flags_is_not_begun_again(tmp_path: Path) -> None:
    group = Group((LAST,), ("--chips=x",))
    with (
        StageProcesses(tmp_path / "jobs", [group]) as found,
        refusal(BadSettingError, "the process of stage 3, --chips=x: see what it said"),
    ):
        until = time.monotonic() + 60
        while time.monotonic() < until:
            found.see_to_them()
            time.sleep(0.05)


@pytest.mark.long
def test_processes_with_a_core_each_share_the_jobs(
    processes: StageProcesses, tmp_path: Path
) -> None:
    """Of the same queue, with the same bits in both, neither on the other's core."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("needs two cores")
    alone, runs = tmp_path / "alone", [tmp_path / str(number) for number in range(4)]
    assert processes.do(alone, steps_for(alone, seed=9)) == (0, "")
    with StageProcesses(tmp_path / "jobs", groups_of(["0", "1"])) as found:
        until = time.monotonic() + 120
        while not found.are_ready() and time.monotonic() < until:
            time.sleep(0.1)
        said = [
            read
            for path in (tmp_path / "jobs" / WORKERS_FOLDER).glob("*.json")
            if 2 in (read := json.loads(path.read_text()))["stages"]
        ]
        assert [os.sched_getaffinity(each["pid"]) for each in said] in (
            [{cores[0]}, {cores[1]}],
            [{cores[1]}, {cores[0]}],
        )
        jobs = [found.queue.add(each, steps_for(each, seed=9)) for each in runs]
        workers = set()
        while not all(job.has_ended for job in jobs) and time.monotonic() < until:
            jobs = [now for job in jobs if (now := found.queue.get(job.number)) is not None]
            workers |= {j.worker for j in jobs if j.state is State.RUNNING and j.step.stage == 2}
            time.sleep(0.01)
        assert {job.state for job in jobs} == {State.DONE} and len(workers) == 2
    pictures = [read_pixels(each / PICTURE).astype(int) for each in (alone, *runs)]
    # On all cores sums may be taken in another order.
    assert max(abs(picture - pictures[0]).max() for picture in pictures) <= 1
    for each, picture in zip(runs, pictures[1:], strict=True):
        assert np.array_equal(picture, pictures[1])
        report = read_report(each, 2)
        assert report is not None and report.devices == 1
