"""No room, no right to write, no memory: one sentence, exit code 5, earlier files as they were."""

import json
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import LONG, Run, file_contents

NEW_SEED = {0: (), 1: ("--prompt", "a blue ring"), 2: ("--seed", 5), 3: ("--image_format", "webp")}


def limited(kind: int, amount: int) -> Callable[[], None]:
    """Limit what a process that is about to start may use."""
    return lambda: resource.setrlimit(kind, (amount, amount))


def check_error(result: "subprocess.CompletedProcess[str]", said: str) -> None:
    """The stage ended with 5, and one sentence."""
    assert result.returncode == 5, result.stderr
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize(
    "number",
    [pytest.param(0, marks=LONG), pytest.param(1, marks=LONG), 2, pytest.param(3, marks=LONG)],
)
def test_a_limit_on_files_leaves_the_old_ones(run_copy: Path, stage: Run, number: int) -> None:
    if number == 0:
        image = run_copy / "output_image_0000.png"
        result = stage(1, "--output_dir", run_copy, "--image", image)
        assert result.returncode == 0, result.stderr
    before = file_contents(run_copy)
    result = stage(
        *(number, "--output_dir", run_copy, *NEW_SEED[number]),
        preexec_fn=limited(resource.RLIMIT_FSIZE, 2048),
    )
    check_error(result, "cannot be written (File too large)")
    assert file_contents(run_copy) == before


@pytest.mark.slow
def test_a_full_disk_leaves_the_old_files(
    finished_run: Path, stage: Run, small_disk: Path, tmp_path: Path
) -> None:
    image = finished_run / "output_image_0000.png"
    begun = tmp_path / "begun"
    assert stage(1, "--output_dir", begun, "--image", image).returncode == 0
    for name in ("generation_config.json", "stage1_embeddings.safetensors"):
        (small_disk / name).write_bytes((finished_run / name).read_bytes())
    free = os.statvfs(small_disk)
    (small_disk / "other people's").write_bytes(b"x" * (free.f_bavail * free.f_frsize - 8192))
    before = file_contents(small_disk)
    for number in (1, 2):
        result = stage(number, "--output_dir", small_disk, *NEW_SEED[number])
        check_error(result, "cannot be written (No space left on device): make room")
        assert file_contents(small_disk) == before
    result = stage(0, "--input_dir", begun, "--output_dir", small_disk)
    check_error(result, "cannot be written (No space left on device): make room")
    assert file_contents(small_disk) == before


def test_a_read_only_folder(finished_run: Path, stage: Run, small_disk: Path) -> None:
    for name in ("generation_config.json", "stage1_embeddings.safetensors"):
        (small_disk / name).write_bytes((finished_run / name).read_bytes())
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for number in (1, 2):
        result = stage(number, "--output_dir", small_disk, *NEW_SEED[number])
        check_error(result, "Read-only file system")


@pytest.mark.slow
@pytest.mark.long
def test_many_prompts_take_little_more_memory_than_their_embeddings(
    tmp_path: Path, stage: Run
) -> None:
    """They are written as they are made; 400 MB are libraries."""
    lines = (f"a large red star on background {k}\n" for k in range(10_000))
    (tmp_path / "prompts.txt").write_text("".join(lines))
    run_dir = tmp_path / "run"
    result = stage(1, "--output_dir", run_dir, "--prompts_file", tmp_path / "prompts.txt")
    assert result.returncode == 0, result.stderr
    report = json.loads((run_dir / "stage1_report.json").read_text())
    data = (run_dir / "stage1_embeddings.safetensors").stat().st_size
    assert data > 900e6 and report["peak_host_bytes"] < 1.5 * data
    shutil.rmtree(run_dir)  # a GB


@pytest.mark.slow
@pytest.mark.long
def test_no_memory_on_the_device(tmp_path: Path, stage: Run) -> None:
    flags = ("--height", 4096, "--width", 4096, "--num_inference_steps", 1)
    assert stage(1, "--output_dir", tmp_path, *flags).returncode == 0
    before = file_contents(tmp_path)
    result = stage(
        *(2, "--output_dir", tmp_path), preexec_fn=limited(resource.RLIMIT_AS, 9_000_000_000)
    )
    assert result.returncode == 5, result.stderr
    assert "out of memory" in result.stderr and "--batch_size" in result.stderr
    assert file_contents(tmp_path) == before
