"""Bad input: one sentence, the documented exit code, and every earlier file as it was."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import DEMO, Run, file_contents

EMBEDDINGS, LATENTS = "stage1_embeddings.safetensors", "stage2_latents.safetensors"


def expect(result: object, code: int, *words: str) -> None:
    """One sentence on standard error with the words in it, and the exit code."""
    stderr = result.stderr  # type: ignore[attr-defined]
    lines = [line for line in stderr.splitlines() if not line.startswith("warning: ")]
    assert result.returncode == code, stderr  # type: ignore[attr-defined]
    assert len(lines) == 1 and lines[0].startswith("error: "), stderr
    for word in words:
        assert word in stderr


@pytest.mark.parametrize(
    ("number", "arguments", "words"),
    [
        (1, ["--num_inference_step", "3"], ["--num_inference_step"]),
        (1, ["--num_inference_steps", "0"], ["--num_inference_steps"]),
        (1, ["--num_inference_steps", "many"], ["--num_inference_steps"]),
        (1, ["--height", "100"], ["--height 100", "multiple of 8", "96 or 104"]),
        (1, ["--seed", "-1"], ["--seed"]),
        (1, ["--scheduler", "eulr"], ["--scheduler", "euler"]),
        (1, ["--dtype", "float16"], ["text_encoder_dtype", "float32"]),
        (1, ["--model_id", "no_such_folder"], ["--model_id no_such_folder"]),
        (1, ["--prompt", "a", "--prompts_file", "b"], ["--prompt", "--prompts_file"]),
        (1, ["--negative_prompt", "a", "--no_negative_prompt"], ["--no_negative_prompt"]),
        (2, ["--num_inference_steps", "0"], ["--num_inference_steps"]),
        (2, ["--width", "131"], ["--width 131"]),
        (2, ["--prompt", "a"], ["--prompt"]),
        (2, ["--mesh", "data=x"], ["--mesh data=x"]),
        (3, ["--image_format", "gif"], ["image_format", "png"]),
        (3, ["--seed", "1"], ["--seed"]),
        (2, ["--save_hlo", "x"], ["--save_hlo", "--topology"]),
        (3, ["--pictures_shape", "1,8,8"], ["--pictures_shape", "--topology"]),
    ],
)
def test_a_bad_flag_exits_2(
    run_copy: Path, stage: Run, number: int, arguments: list[str], words: list[str]
) -> None:
    before = file_contents(run_copy)
    expect(stage(number, "--output_dir", run_copy, *arguments), 2, *words)
    assert file_contents(run_copy) == before


def test_hyphens_work_in_flags_as_well(run_copy: Path, stage: Run) -> None:
    expect(
        stage(2, "--output-dir", run_copy, "--num-inference-steps", "0"),
        *(2, "--num_inference_steps"),
    )


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("num_steps: 3", 2, ["config.yaml", "num_steps", "did you mean"]),
        ("height: 100", 2, ["--height 100"]),
        ("seed: [", 3, ["config.yaml", "not YAML"]),
    ],
)
def test_a_bad_config_file(
    run_copy: Path, stage: Run, tmp_path: Path, text: str, code: int, words: list[str]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    before = file_contents(run_copy)
    expect(stage(1, "--config", file, "--output_dir", run_copy), code, *words)
    assert file_contents(run_copy) == before


def test_an_empty_prompts_file_exits_2(run_copy: Path, stage: Run, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n")
    before = file_contents(run_copy)
    result = stage(1, "--prompts_file", tmp_path / "prompts.txt", "--output_dir", run_copy)
    expect(result, 2, "prompts.txt", "no prompt")
    assert file_contents(run_copy) == before


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(bytes(content))


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, empty, Path.unlink])
@pytest.mark.parametrize(("number", "name"), [(2, EMBEDDINGS), (3, LATENTS)])
def test_a_damaged_or_missing_input_exits_3(
    run_copy: Path, stage: Run, number: int, name: str, damage: Callable[[Path], None]
) -> None:
    damage(run_copy / name)
    before = file_contents(run_copy)
    expect(stage(number, "--output_dir", run_copy), 3, name, f"stage{number - 1}_")
    assert file_contents(run_copy) == before


def test_a_missing_generation_config_exits_3(run_copy: Path, stage: Run) -> None:
    (run_copy / "generation_config.json").unlink()
    for number in (2, 3):
        expect(stage(number, "--output_dir", run_copy), 3, "generation_config.json", "stage 1")


def test_embeddings_of_other_prompts_exit_3(run_copy: Path, stage: Run) -> None:
    path = run_copy / "generation_config.json"
    config = json.loads(path.read_text())
    config["prompts"][0]["prompt"] = "a green ring"
    path.write_text(json.dumps(config))
    before = file_contents(run_copy)
    expect(stage(2, "--output_dir", run_copy), 3, EMBEDDINGS, "other prompts")
    assert file_contents(run_copy) == before


def test_latents_of_other_embeddings_exit_3(run_copy: Path, stage: Run) -> None:
    """A new prompt was encoded, but not denoised: its old picture must not pass for it."""
    assert stage(1, "--output_dir", run_copy, "--prompt", "a green ring").returncode == 0
    before = file_contents(run_copy)
    expect(stage(3, "--output_dir", run_copy), 3, LATENTS, EMBEDDINGS, "made from other data")
    assert file_contents(run_copy) == before


@pytest.mark.slow
def test_no_verify_trusts_the_checksum_of_an_input(run_copy: Path, stage: Run) -> None:
    flip_a_bit(run_copy / LATENTS)
    expect(stage(3, "--output_dir", run_copy), 3, LATENTS, "checksum")
    result = stage(3, "--output_dir", run_copy, "--no_verify")
    assert result.returncode == 0, result.stderr


def test_offline_forbids_to_fetch_a_checkpoint(tmp_path: Path, stage: Run) -> None:
    result = stage(1, "--output_dir", tmp_path / "run", "--offline", "--model_id", "org/name")
    expect(result, 5, "--model_id org/name", "--offline")
    assert not (tmp_path / "run").exists()


def test_files_in_each_others_place_exit_3(run_copy: Path, stage: Run) -> None:
    shutil.copy(run_copy / EMBEDDINGS, run_copy / LATENTS)
    expect(stage(3, "--output_dir", run_copy), 3, LATENTS, "lacks latents")


def test_a_checkpoint_without_safetensors_exits_3(
    run_copy: Path, demo_copy: Path, stage: Run
) -> None:
    before = file_contents(run_copy)
    for number, component in ((1, "text_encoder_2"), (2, "unet"), (3, "vae")):
        for weights in (demo_copy / component).glob("*.safetensors"):
            weights.rename(weights.with_suffix(".bin"))
        result = stage(number, "--output_dir", run_copy, "--model_id", demo_copy)
        expect(result, 3, component, "safetensors")
    assert file_contents(run_copy) == before


def test_a_checkpoint_of_another_pipeline_exits_2(
    tmp_path: Path, demo_copy: Path, stage: Run
) -> None:
    index = demo_copy / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionXLPipeline", "FluxPipeline"))
    result = stage(1, "--output_dir", tmp_path / "run", "--model_id", demo_copy)
    expect(result, 2, "FluxPipeline", "StableDiffusionXLPipeline")
    assert not (tmp_path / "run").exists()


def test_run_all_refuses_before_anything_runs(tmp_path: Path, run_all: Run) -> None:
    run_dir = tmp_path / "run"
    for arguments, words in (
        (["--num_inference_step", "3"], ["--num_inference_step"]),
        (["--from_stage", "3", "--to_stage", "2"], ["--from_stage 3"]),
        (["--from_stage", "0"], ["--from_stage 0"]),
        (["--to_stage", "1", "--mesh", "single"], ["--mesh", "no stage from 1 to 1"]),
        (["--from_stage", "3", "--seed", "1"], ["--seed", "no stage from 3 to 3"]),
    ):
        expect(run_all("--output_dir", run_dir, *arguments), 2, *words)
        assert not run_dir.exists()


def test_run_all_ends_with_the_first_failing_stages_code(tmp_path: Path, run_all: Run) -> None:
    result = run_all("--output_dir", tmp_path / "run", "--height", 100)
    expect(result, 2, "--height 100")
    result = run_all("--output_dir", tmp_path / "run", "--from_stage", 2)
    expect(result, 3, "generation_config.json")


def test_an_output_folder_that_cannot_be_written_exits_5(tmp_path: Path, stage: Run) -> None:
    (tmp_path / "file").write_text("")
    result = stage(1, "--output_dir", tmp_path / "file" / "below", "--model_id", DEMO)
    expect(result, 5, "--output_dir")
