"""Pictures appear while stage 2 runs, and are those that stage 3 makes in its turn."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.torch import load_file

from common.errors import BadInputFileError, BadSettingError
from common.files import artifacts
from common.files.artifacts import MADE_BY, Header
from common.files.kept_progress import Progress, remove_progress
from common.files.report import read_report
from common.files.rows import Rows
from common.files.rows_to_come import announce
from common.files.run_lock import RunLock
from common.files.stage_table import LATENTS_FILE
from tests.conftest import RUN_ALL, Run
from tests.refusals import call, refusal

PICTURES = ("output_image_0000.png", "output_image_0001.png")


class Stage2:
    """This process, as far as stage 3 sees what stage 2 does: its lock, and what it keeps."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        header = artifacts.inspect(run_dir / LATENTS_FILE).header
        assert header is not None
        self.header: Header = header
        self.latents = load_file(run_dir / LATENTS_FILE)["latents"]
        self.progress = Progress(run_dir, 2, {})
        self.lock = RunLock.of_stage(run_dir, wait=False)

    def finish(self, image: int) -> None:
        """A group of one image is done."""
        fingerprints = [row.fingerprint for row in self.header.rows]
        where_from = {**self.header.provenance, MADE_BY: []}
        announce(
            self.progress,
            self.header.recipe,
            where_from,
            Rows(recipes=[], fingerprints=fingerprints),
        )
        own = {"latents": self.latents[image : image + 1]}
        self.progress.save_group(
            fingerprints[image : image + 1], own, seconds=1.5, made_by=self.header.made_by(image)
        )

    @contextmanager
    def running(self) -> Iterator[None]:
        self.lock.acquire()
        try:
            yield
        finally:
            remove_progress(self.run_dir, 2)
            self.lock.release()


def begin_stage_3(run_dir: Path, *flags: str) -> tuple[threading.Thread, list[BaseException]]:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            call(3, "--output_dir", run_dir, "--stream", *flags)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, errors


def wait_for(path: Path, thread: threading.Thread) -> None:
    until = time.monotonic() + 60
    while not path.exists():
        assert thread.is_alive() and time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize("flags", [(), ("--skip_fresh",)])
def test_stage_3_decodes_what_stage_2_has_finished(
    run_copy: Path, finished_run: Path, flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (*PICTURES, "output_grid.png"):
        (run_copy / name).unlink()
    stage_2 = Stage2(run_copy)
    with stage_2.running():
        thread, errors = begin_stage_3(run_copy, *flags)
        stage_2.finish(1)
        wait_for(run_copy / PICTURES[1], thread)
        assert not (run_copy / PICTURES[0]).exists()
    thread.join()
    assert not errors
    for name in (*PICTURES, "output_grid.png"):
        assert (run_copy / name).read_bytes() == (finished_run / name).read_bytes()
    lines = (run_copy / "images.jsonl").read_text().splitlines()
    assert len(lines) == 2 and json.loads(lines[1])["seconds"] >= 1.5
    report = read_report(run_copy, 3)
    assert report is not None and report.rows_taken == 0 and report.shapes["images"][0] == 2
    assert report.seconds.waiting > 0
    assert "1 decoded while stage 2 ran" in capsys.readouterr().out


def test_pictures_that_are_there_stay(run_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_copy / PICTURES[0]).unlink()
    there = (run_copy / PICTURES[1]).stat().st_ino
    stage_2 = Stage2(run_copy)
    with stage_2.running():
        thread, errors = begin_stage_3(run_copy, "--skip_fresh")
        stage_2.finish(1)
        stage_2.finish(0)
        wait_for(run_copy / PICTURES[0], thread)
    thread.join()
    assert not errors and (run_copy / PICTURES[1]).stat().st_ino == there
    report = read_report(run_copy, 3)
    assert report is not None and report.rows_taken == 1


def test_pictures_that_stand_elsewhere_are_moved_before_others_take_their_places(
    run_copy: Path, finished_run: Path
) -> None:
    first, second = (run_copy / name for name in PICTURES)
    inodes = {path.stat().st_ino for path in (first, second)}
    first.rename(run_copy / "aside")
    second.rename(first)
    (run_copy / "aside").rename(second)
    stage_2 = Stage2(run_copy)
    with stage_2.running():
        thread, errors = begin_stage_3(run_copy, "--skip_fresh")
        stage_2.finish(0)
        wait_for(run_copy / "stage3_progress", thread)
    thread.join()
    assert not errors and {path.stat().st_ino for path in (first, second)} == inodes
    for name in PICTURES:
        assert (run_copy / name).read_bytes() == (finished_run / name).read_bytes()


def test_without_grids_its_report_is_written_all_the_same(run_copy: Path) -> None:
    stage_2 = Stage2(run_copy)
    (run_copy / PICTURES[0]).unlink()
    (run_copy / "stage3_report.json").unlink()
    flags = ("--skip_fresh", "--grid_images", "0")
    with stage_2.running():
        thread, errors = begin_stage_3(run_copy, *flags)
        stage_2.finish(0)
        wait_for(run_copy / PICTURES[0], thread)
    thread.join()
    assert not errors and (run_copy / "stage3_report.json").exists()


def test_where_stage_2_ends_early_it_is_said_and_pictures_stay(run_copy: Path) -> None:
    (run_copy / PICTURES[0]).unlink()
    stage_2 = Stage2(run_copy)
    (run_copy / LATENTS_FILE).unlink()
    with stage_2.running():
        thread, errors = begin_stage_3(run_copy)
        stage_2.finish(0)
        wait_for(run_copy / PICTURES[0], thread)
    thread.join()
    with refusal(BadInputFileError, "stage 2 ended before", LATENTS_FILE, "the same command"):
        raise errors[0]
    assert (run_copy / PICTURES[0]).exists() and not list(run_copy.glob(".*"))


def test_where_no_stage_runs_it_is_a_run_like_any_other(run_copy: Path, finished_run: Path) -> None:
    (run_copy / PICTURES[0]).unlink()
    call(3, "--output_dir", run_copy, "--stream")
    assert (run_copy / PICTURES[0]).read_bytes() == (finished_run / PICTURES[0]).read_bytes()
    report = read_report(run_copy, 3)
    assert report is not None and report.seconds.waiting == 0


def test_what_does_not_go_with_it(run_copy: Path, tmp_path: Path, run_all: Run) -> None:
    for flags in (("--repeat", "1"), ("--profile",)):
        with refusal(BadSettingError, f"--stream does not go with {flags[0]}"):
            call(3, "--output_dir", run_copy, "--stream", *flags)
    with refusal(BadSettingError, "--stream", "leave --input_dir out"):
        call(3, "--output_dir", tmp_path / "other", "--input_dir", run_copy, "--stream")
    result = run_all("--output_dir", run_copy, "--stream", "--repeat", 2)
    assert result.returncode == 2 and "--stream does not go with --repeat" in result.stderr
    for flags in (("--input_dir", run_copy), ("--from_stage", 3), ("--to_stage", 2)):
        result = run_all("--output_dir", run_copy, "--stream", *flags)
        assert result.returncode == 2 and "--stream" in result.stderr and "leave" in result.stderr
    result = run_all("--output_dir", run_copy, "--stream", "--sweep", "seed=1,2")
    assert result.returncode == 2 and "--stream does not go with --sweep" in result.stderr


@pytest.mark.slow
def test_pictures_are_there_while_others_are_denoised(tmp_path: Path, run_all: Run) -> None:
    """And all files are in the end those of a run whose stages follow each other."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"a large red star, number {number}\n" for number in range(12)))
    flags = ("--prompts_file", prompts, "--batch_size", 1, "--num_inference_steps", 50)
    streamed, in_turn = tmp_path / "streamed", tmp_path / "in_turn"
    command = [sys.executable, str(RUN_ALL), *map(str, flags), "--stream"]
    with subprocess.Popen(
        [*command, "--output_dir", str(streamed)],
        stdout=subprocess.PIPE,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
    ) as process:
        while not list(streamed.glob("output_image_*.png")):
            assert process.poll() is None
            time.sleep(0.05)
        groups = len(list((streamed / "stage2_progress").glob("group_*")))
        said, _ = process.communicate()
    assert process.returncode == 0 and "decoded while stage 2 ran" in said
    assert 0 < groups < 12
    assert run_all(*flags, "--output_dir", in_turn).returncode == 0
    assert {path.name for path in streamed.iterdir()} == {path.name for path in in_turn.iterdir()}
    for path in in_turn.glob("output_*"):
        assert path.read_bytes() == (streamed / path.name).read_bytes(), path.name
    for own in in_turn.glob("*.safetensors"):
        found, expected = artifacts.inspect(streamed / own.name), artifacts.inspect(own)
        assert found.data_sha256 == expected.data_sha256
        assert found.header is not None and expected.header is not None
        assert found.header.recipe == expected.header.recipe
