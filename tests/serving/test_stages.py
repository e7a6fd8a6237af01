"""From Python: the same pictures as by the command, and warm from the second run on."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from common.errors import BadSettingError
from common.files.picture_files import read_picture_record, read_pixels
from common.serving.stages import Stages
from tests.conftest import Run
from tests.refusals import refusal

SMALL = {"height": 64, "width": 64, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def stages() -> Iterator[Stages]:
    with Stages(model_id="models/demo", mesh="single", **SMALL) as found:
        yield found


@pytest.mark.slow
def test_a_run_is_as_by_the_command_and_the_next_one_is_warm(
    stages: Stages, tmp_path: Path, quick_stage: Run
) -> None:
    first = stages.run(prompt="a red star", output_dir=tmp_path / "first")
    assert first.files == [tmp_path / "first" / "output_image.png"]
    second = stages.run(
        prompt=["a blue ring", "a star"], seed=3, output_dir=tmp_path / "second", batch_size=1
    )
    assert len(second.pictures) == 2 and second.pictures[0].size == (64, 64)
    report = second.report(2)
    assert report.programs is None and report.shapes["latents"] == [2, 4, 8, 8]
    by_script = tmp_path / "by_script"
    flags = [f"--{name}={value}" for name, value in SMALL.items()]
    result = quick_stage(1, "--output_dir", by_script, *flags, "--prompt=a red star")
    assert result.returncode == 0, result.stderr
    for number in (2, 3):
        result = quick_stage(number, "--output_dir", by_script, "--mesh", "single")
        assert result.returncode == 0, result.stderr
    (ours,), (expected,) = first.files, [by_script / "output_image.png"]
    # This process has other virtual devices, and so other threads for each.
    assert np.abs(read_pixels(ours).astype(int) - read_pixels(expected)).max() <= 1
    records = [read_picture_record(path) for path in (ours, expected)]
    assert records[0] is not None and records[1] is not None
    for name in ("settings", "weights", "versions"):
        assert records[0][name] == records[1][name]


def test_what_is_fresh_is_not_made_again(
    stages: Stages, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        stages.run(prompt="a ring", output_dir=tmp_path)
    assert capsys.readouterr().out.count("fresh (") == 3


def test_folders_of_their_own(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runs = [stages.run(prompt="a ring", seed=seed) for seed in (1, 2)]
    assert [run.run_dir for run in runs] == [
        Path("stage_outputs/run_0001"),
        Path("stage_outputs/run_0002"),
    ]
    assert not np.array_equal(*map(np.asarray, (run.pictures[0] for run in runs)))


def test_zero_is_a_value(stages: Stages, tmp_path: Path) -> None:
    run = stages.run(prompt="a ring", seed=0, guidance_scale=0, offline=False, output_dir=tmp_path)
    record = read_picture_record(run.files[0])
    assert record is not None
    assert (record["settings"]["seed"], record["settings"]["guidance_scale"]) == (0, 0)


def test_what_is_refused(stages: Stages, tmp_path: Path) -> None:
    with refusal(BadSettingError, "--stepz: no stage from 1 to 3 takes it"):
        stages.run(stepz=3, output_dir=tmp_path / "run")
    with refusal(BadSettingError, "flags have _ here"):
        stages.run(**{"num-inference-steps": 3}, output_dir=tmp_path / "run")
    with refusal(BadSettingError, "keep 0: give a number"):
        Stages(keep=0)
    with refusal(BadSettingError, "--height 63 is not a multiple of 8"):
        stages.run(height=63, output_dir=tmp_path / "run")
    with refusal(BadSettingError, "has no report of stage 0"):
        stages.run(prompt="a ring", output_dir=tmp_path / "good").report(0)
    assert not (tmp_path / "run").exists()
