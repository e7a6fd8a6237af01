"""`--profile`: traces that jax's and torch's own readers open, tables that add up, same outputs."""

import gzip
import json
import os
from pathlib import Path

import pytest
from diffusers import AutoencoderKL, UNet2DConditionModel
from jax.profiler import ProfileData
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from common.files.report import Profile, Report
from tests.conftest import DEMO, Run

TOLERANCE = 0.15  # of the window that was measured


def profile_of(run_dir: Path, number: int) -> Profile:
    report = Report.model_validate_json((run_dir / f"stage{number}_report.json").read_text())
    assert report.profile is not None
    return report.profile


def check_table(profile: Profile, printed: str, modules: set[str]) -> None:
    """The table adds up to the window, and names modules of the model."""
    busy = sum(profile.by_block.values())
    assert busy == pytest.approx(sum(profile.by_kind.values()), rel=1e-3)
    assert busy > 0 and profile.idle_seconds >= 0
    # Operations of one device overlap, by much where its threads wait for those of other processes.
    shares = (busy + profile.idle_seconds) / profile.window_seconds
    assert 1 - TOLERANCE < shares < (os.cpu_count() or 1) * (1 + TOLERANCE)
    named = [operation.module for operation in profile.operations if operation.module]
    assert len(named) > 10
    assert set(named) <= modules
    longest = profile.operations[0]
    assert f"{longest.name}  {longest.module or 'outside of modules'}" in printed


def steps_in(trace: Path) -> list[int]:
    """The steps that a trace of jax's has marks of, by jax's own reader."""
    found = []
    for plane in ProfileData.from_file(str(trace)).planes:
        for line in plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                if event.name == "step" and "step_num" in stats:
                    found.append(int(stats["step_num"]))
    return found


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("mesh", ["cfg=2", pytest.param("single", marks=pytest.mark.slow)])
def test_stage_2_traces_the_steps_that_were_asked_for(
    run_copy: Path, stage: Run, mesh: str
) -> None:
    plain = stage(2, "--output_dir", run_copy, "--mesh", mesh, "--num_inference_steps", 10)
    assert plain.returncode == 0, plain.stderr
    expected = load_file(run_copy / "stage2_latents.safetensors")["latents"]
    result = stage(
        *(2, "--output_dir", run_copy, "--mesh", mesh, "--num_inference_steps", 10),
        *("--profile_steps", "5:8"),
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    profile = profile_of(run_copy, 2)
    assert profile.steps == (5, 8)
    trace = Path(profile.trace)
    assert trace.is_relative_to(run_copy / "profile" / "stage2")
    assert sorted(steps_in(trace)) == [5, 6, 7]
    unet = UNet2DConditionModel.from_pretrained(DEMO, subfolder="unet")
    check_table(profile, result.stdout, {name for name, _ in unet.named_modules()})
    devices = 1 if mesh == "single" else 2
    assert all(operation.count == 3 * devices for operation in profile.operations[:5])
    assert "xprof --logdir" in result.stdout
    # Perfetto reads the same trace as JSON.
    (perfetto,) = trace.parent.glob("*.trace.json.gz")
    with gzip.open(perfetto) as file:
        assert json.load(file)["traceEvents"]
    found = load_file(run_copy / "stage2_latents.safetensors")["latents"]
    assert found.equal(expected)


@pytest.mark.slow
@pytest.mark.long
def test_stage_3_and_stage_1_trace_their_modules(
    run_copy: Path, stage: Run, tmp_path: Path
) -> None:
    compiled = ("--output_dir", run_copy, "--backend", "jax")
    assert stage(3, *compiled).returncode == 0
    pictures = {path.name: path.read_bytes() for path in run_copy.glob("output_*")}
    result = stage(3, *compiled, "--profile", "--profile_dir", tmp_path / "traces")
    assert result.returncode == 0, result.stderr
    profile = profile_of(run_copy, 3)
    assert Path(profile.trace).is_relative_to(tmp_path / "traces" / "stage3")
    assert steps_in(Path(profile.trace)) == [0]
    vae = AutoencoderKL.from_pretrained(DEMO, subfolder="vae")
    check_table(profile, result.stdout, {name for name, _ in vae.named_modules()})
    assert {path.name: path.read_bytes() for path in run_copy.glob("output_*")} == pictures

    before = load_file(run_copy / "stage1_embeddings.safetensors")
    result = stage(1, "--output_dir", run_copy, "--profile")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    profile = profile_of(run_copy, 1)
    names = {
        name
        for component, model in (
            ("text_encoder", CLIPTextModel),
            ("text_encoder_2", CLIPTextModelWithProjection),
        )
        for name, _ in model.from_pretrained(DEMO, subfolder=component).named_modules(
            prefix=component
        )
    }
    check_table(profile, result.stdout, names)
    with gzip.open(profile.trace) as file:
        events = json.load(file)["traceEvents"]
    assert {"module: text_encoder"} <= {event.get("name") for event in events}
    after = load_file(run_copy / "stage1_embeddings.safetensors")
    assert all(after[name].equal(tensor) for name, tensor in before.items())


def test_steps_beyond_the_run_are_an_error(run_copy: Path, quick_stage: Run) -> None:
    for steps, said in (("2:9", "the run has 4 steps, 0 to 3"), ("5", "as 5:8"), ("3:3", "5:8")):
        result = quick_stage(2, "--output_dir", run_copy, "--profile_steps", steps)
        assert result.returncode == 2
        assert "profile_steps" in result.stderr and said in result.stderr
        assert not (run_copy / "profile").exists()


@pytest.mark.slow
@pytest.mark.long
def test_a_folder_that_cannot_be_written_is_an_error(run_copy: Path, stage: Run) -> None:
    (run_copy / "file").write_text("")
    for number in (1, 2, 3):
        result = stage(
            number, "--output_dir", run_copy, "--profile_dir", run_copy / "file" / "traces"
        )
        assert result.returncode == 5, result.stderr
        assert "--profile_dir" in result.stderr and result.stderr.count("\n") == 1
