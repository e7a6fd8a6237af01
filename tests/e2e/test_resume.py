"""Progress: used by the same run alone, kept by groups and steps, gone when the output is there."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from common.compute.backends import TORCH_FACTS
from common.compute.kept import Kept
from common.conditions.prompts import encode_into, encode_prompts, read_texts
from common.files.kept_progress import UNTOLD, Progress, remove_progress
from common.files.made_rows import MadeRows
from common.files.recipe import Recipe
from common.files.run_lock import HELD_BY_PARENT
from common.files.stage_table import DENOISE
from common.runs.flags import Given
from common.runs.stage_run import StageRun
from common.sampling.denoising import Denoised
from common.stopping import StoppedError, StopRequest
from tests.conftest import PROJECT_DIR, STAGES, Run
from tests.in_process import Ours, make_config
from tests.tiny_checkpoints import save_sdxl

LATENTS = "stage2_latents.safetensors"


class StopAfter(StopRequest):
    """A request that comes when it has been looked at some times."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    @property
    def number(self) -> int | None:  # type: ignore[override]
        self.looks -= 1
        return signal.SIGTERM if self.looks < 0 else None


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sdxl(tmp_path_factory.mktemp("tiny") / "sdxl")


@pytest.fixture(scope="module", params=["jax", "torch"])
def ours(request: pytest.FixtureRequest, model: Path) -> Ours:
    return Ours(model, backend=request.param)


@pytest.mark.parametrize(
    ("scheduler", "steps_per_call"),
    [
        *(("euler_a", None), ("dpmpp_2m", None), ("heun", None)),
        # The loop is the same for all: a scheduler is its tables.
        pytest.param("dpmpp_2m", 2, marks=pytest.mark.slow),
    ],
)
def test_a_run_stopped_after_any_step_gives_the_same_bits(
    ours: Ours, model: Path, scheduler: str, steps_per_call: int | None, tmp_path: Path
) -> None:
    """Three images in groups of two, stopped again and again until they are done."""
    config = make_config(model, batch=3, scheduler=scheduler, num_inference_steps=5)

    def denoise(progress: Progress | None, stop: StopRequest | None) -> Denoised:
        changes = {"batch_size": 2, "save_trajectory": 2, "steps_per_call": steps_per_call}
        return ours.denoised(config, progress=progress, stop=stop, **changes)

    expected = denoise(None, None)
    progress = Progress(tmp_path, 2, {"fingerprint": "1"})
    stops, found = 0, None
    while found is None:
        try:
            found = denoise(progress, StopAfter(looks=2))
        except StoppedError as error:
            assert error.exit_code == 143
            assert "which are kept: the same command goes on from there" in str(error)
            stops += 1
            assert stops < 30
    assert stops >= 2
    assert found.latents.equal(expected.latents)
    assert found.trajectory is not None and expected.trajectory is not None
    assert found.trajectory.equal(expected.trajectory)
    assert len(list((tmp_path / "stage2_progress").glob("group_*.safetensors"))) == 2
    remove_progress(tmp_path, 2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("looks", "expected_stops"), [(0, 3), (1, 1)])
def test_encoding_stopped_after_any_prompt_gives_the_same_bits(
    ours: Ours, model: Path, looks: int, expected_stops: int, tmp_path: Path
) -> None:
    config = make_config(model, batch=3)
    expected = encode_prompts(ours.text_pipeline, config)
    texts = read_texts(ours.text_pipeline, config)
    # Left by a run of other settings, of its third prompt.
    other = MadeRows.numbered(3, Progress(tmp_path, 1, {"fingerprint": "2"}))
    zeros = {name: torch.zeros_like(tensor[:1]) for name, tensor in expected.items()}
    other.put([2], zeros, UNTOLD, keep=True)
    progress, stops, found = Progress(tmp_path, 1, {"fingerprint": "1"}), 0, None
    while found is None:
        try:
            made = MadeRows.numbered(3, progress)
            encode_into(made, lambda _: ours.text_pipeline, config, texts, StopAfter(looks))
            found = {name: made.read(range(3), name) for name in expected}
        except StoppedError as error:
            stops += 1
            assert f"after {stops * (looks + 1)} of 3 prompts, which are kept" in str(error)
    assert stops == expected_stops
    assert found.keys() == expected.keys()
    assert all(found[name].equal(expected[name]) for name in expected)


def test_progress_of_other_settings_and_damaged_progress_is_not_used(tmp_path: Path) -> None:
    progress = Progress(tmp_path, 2, {"seed": 1})
    tensors = {"latents": torch.arange(6.0)}
    progress.save_steps(0, tensors)
    progress.save_group(1, tensors)
    assert progress.read_steps(0) is None  # a finished group takes the place of its steps
    progress.save_steps(0, tensors)
    same = Progress(tmp_path, 2, {"seed": 1})
    for read in (same.read_steps(0), same.read_group(1)):
        assert read is not None and read["latents"].equal(tensors["latents"])
    assert same.read_steps(1) is None and same.read_group(0) is None
    other = Progress(tmp_path, 2, {"seed": 2})
    assert other.read_steps(0) is None and other.read_group(1) is None
    for path in (same.file, tmp_path / "stage2_progress" / "group_0001.safetensors"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    assert same.read_steps(0) is None and same.read_group(1) is None
    same.file.write_bytes(b"damaged")
    assert same.read_steps(0) is None


def test_progress_on_a_cpu_is_for_its_number_of_threads(tmp_path: Path) -> None:
    recipe = Recipe(stage=2, settings={}, weights={}, inputs={}, versions={})
    given = Given(DENOISE, {"output_dir": tmp_path})
    threads = torch.get_num_threads()
    keys = []
    try:
        for number in (1, 2, 1):
            torch.set_num_threads(number)
            with StageRun(DENOISE, given, Kept()) as run:
                run.keep_progress(recipe, TORCH_FACTS)
                assert run.progress is not None
                keys.append(run.progress.key)
    finally:
        torch.set_num_threads(threads)
    assert keys[0] == keys[2] != keys[1]


@pytest.mark.slow
@pytest.mark.long
def test_a_terminated_stage_goes_on_from_its_step(run_copy: Path, stage: Run) -> None:
    flags = ("--num_inference_steps", 300, "--output_dir", run_copy)
    assert stage(2, *flags).returncode == 0
    expected = load_file(run_copy / LATENTS)["latents"]
    command = [sys.executable, str(STAGES[2]), *map(str, flags), "--checkpoint_every", "20"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"XLA_FLAGS": ""}
    )
    progress = run_copy / "stage2_progress.safetensors"
    while not progress.exists() and process.poll() is None:
        time.sleep(0.01)
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143, said
    kept = int(said.split("error: terminated after step ")[1].split()[0])
    assert kept >= 20 and progress.exists()

    # Other settings leave it alone; the same ones go on from there.
    result = stage(2, "--num_inference_steps", 2, "--output_dir", run_copy.parent / "other",
                   "--input_dir", run_copy)  # fmt: skip
    assert result.returncode == 0 and "goes on" not in result.stdout
    result = stage(2, *flags, "--checkpoint_every", 20, "--num_inference_steps", 2)
    said = "what an earlier run kept is not used: num_inference_steps 300 → 2"
    assert result.returncode == 0 and said in result.stdout
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"XLA_FLAGS": ""}
    )
    while not progress.exists() and process.poll() is None:
        time.sleep(0.01)
    process.terminate()
    _, said = process.communicate(timeout=60)
    kept = int(said.split("error: terminated after step ")[1].split()[0])
    result = stage(2, *flags)
    assert f"goes on after step {kept} of 300" in result.stdout
    assert load_file(run_copy / LATENTS)["latents"].equal(expected)
    assert not list(run_copy.glob("*progress*")) and not list(run_copy.glob(".*"))


@pytest.mark.slow
@pytest.mark.long
def test_one_writer_at_a_time(run_copy: Path, stage: Run, run_all: Run) -> None:
    """A second one says who the first is, or waits for it."""
    long = ("--num_inference_steps", "400", "--output_dir", str(run_copy))
    first = subprocess.Popen(
        [sys.executable, str(PROJECT_DIR / "tools" / "run_all.py"), *long],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"XLA_FLAGS": ""},
    )
    lock = run_copy / ".run.lock"
    while not lock.exists() or not lock.read_text():
        time.sleep(0.01)
    assert json.loads(lock.read_text())["pid"] == first.pid
    for number in (1, 2, 3):
        result = stage(number, "--output_dir", run_copy)
        assert result.returncode == 5, result.stdout
        assert f"process {first.pid} on" in result.stderr and "--wait" in result.stderr
        assert result.stderr.count("\n") == 1
    result = run_all("--output_dir", run_copy)
    assert result.returncode == 5 and "is in use by run_all.py" in result.stderr
    first.kill()
    first.wait()
    # The killed program's stage goes on alone, and holds the folder until it ends.
    waiting: Any = stage(3, "--output_dir", run_copy, "--wait")
    assert waiting.returncode == 0, waiting.stderr
    assert not list(run_copy.glob(".*"))
    assert HELD_BY_PARENT not in os.environ
