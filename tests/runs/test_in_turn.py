"""All stages of a run in turn: which of them run, and what each imports ahead."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.errors import BadSettingError
from common.files.stage_table import DENOISE, ENCODE, LATENTS_FILE, STAGES
from common.runs import in_turn
from common.runs.generation import write_generation_config
from tests.configs import make_config
from tests.conftest import DEMO, Run, file_contents
from tests.printed import ran
from tests.refusals import refusal


def test_without_another_process_a_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise BlockingIOError("no more processes")

    monkeypatch.setattr(in_turn, "PreloadedStage", refuse)
    monkeypatch.setattr(in_turn, "SECONDS_OF_A_FRESH_STAGE", 0)
    command = [sys.executable, "-c", "import time; time.sleep(0.5)"]
    commands = dict.fromkeys((ENCODE, DENOISE), command)
    assert in_turn.run_in_turn(commands, {"-c": []}) == 0


@pytest.mark.parametrize(
    ("given", "jax_in_2", "jax_in_3"),
    [
        ({}, True, False),
        ({"dtype": "bfloat16"}, False, False),
        ({"unet_dtype": "float32", "dtype": "bfloat16"}, True, False),
        ({"backend": "jax", "dtype": "bfloat16"}, True, True),
        ({"backend": "torch"}, False, False),
        ({"backend": "jax", "remote_vae": "http://localhost"}, True, False),
    ],
)
def test_what_is_imported_ahead(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], jax_in_2: bool, jax_in_3: bool
) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    libraries = in_turn.libraries_of(given)
    assert libraries is not None
    found = {Path(script).name: modules for script, modules in libraries.items()}
    assert ("common.compute.jax_start" in found["stage2_unet.py"]) == jax_in_2
    assert ("common.compute.jax_start" in found["stage3_vae_decoder.py"]) == jax_in_3
    assert in_turn.libraries_of(given | {"repeat": "3"}) is None


@pytest.mark.slow
def test_only_what_changed_runs_again(run_copy: Path, run_all: Run, tmp_path: Path) -> None:
    base = ["--output_dir", run_copy, "--num_inference_steps", 4, "--num_images_per_prompt", 2]
    before = file_contents(run_copy)
    assert ran(run_all(*base)) == []
    assert file_contents(run_copy) == before
    moved = shutil.copytree(DEMO, tmp_path / "moved")
    assert ran(run_all(*base, "--model_id", moved, "--image_format", "webp")) == [3]
    assert not list(run_copy.glob("*.png"))
    result = run_all(*base, "--image_format", "webp", "--seed", 7)
    assert ran(result) == [2, 3]
    assert "seeds [42, 43] → [7, 8]" in result.stdout


def test_fresh_stages_are_skipped_unless_forced(tmp_path: Path) -> None:
    given = {"output_dir": tmp_path, "seed": 7}
    for force in (False, True):
        commands = in_turn.plan(given, from_stage=1, to_stage=3, force=force)
        skipped = {stage: "--skip_fresh" in command for stage, command in commands.items()}
        assert skipped == dict.fromkeys(STAGES, not force)


def test_the_order_of_stages_is_that_of_a_run() -> None:
    def order(first: int, last: int) -> list[int]:
        return [stage.number for stage in in_turn.plan({}, from_stage=first, to_stage=last)]

    assert (order(1, 3), order(0, 3), order(1, 0)) == ([1, 0, 2, 3], [0, 2, 3], [1, 0])
    for first, last in ((0, 1), (3, 2), (1, 4)):
        with refusal(BadSettingError, f"--from_stage {first}", "stages are 1, 0, 2, 3"):
            order(first, last)


@pytest.mark.parametrize("of_pictures", [False, True])
def test_a_run_without_pictures_has_no_stage_for_them(tmp_path: Path, of_pictures: bool) -> None:
    def command(number: int) -> list[str]:
        return [sys.executable, "-c", f"open({str(tmp_path / str(number))!r}, 'w')"]

    commands = {stage: command(stage.number) for stage in STAGES}
    settled = tmp_path / "run"
    settled.mkdir()
    prompt = {"prompt": "a", "negative_prompt": "", "image": "a.png" if of_pictures else None}
    write_generation_config(settled, make_config(DEMO, prompts=[prompt]))
    assert in_turn.run_in_turn(commands, None, settled) == 0
    ran = {int(path.name) for path in tmp_path.iterdir() if path.is_file()}
    assert ran == ({0, 1, 2, 3} if of_pictures else {1, 2, 3})


@pytest.mark.slow
@pytest.mark.long
def test_a_damaged_output_is_made_again(run_copy: Path, run_all: Run) -> None:
    base = ["--output_dir", run_copy, "--num_inference_steps", 4, "--num_images_per_prompt", 2]
    expected = load_file(run_copy / LATENTS_FILE)["latents"].clone()  # the file is mapped, then cut
    content = (run_copy / LATENTS_FILE).read_bytes()
    (run_copy / LATENTS_FILE).write_bytes(content[:-8])
    (run_copy / "output_image_0001.png").write_bytes(b"")
    result = run_all(*base)
    assert ran(result) == [2, 3]
    assert "stage2_latents.safetensors is damaged" in result.stdout
    assert torch.equal(load_file(run_copy / LATENTS_FILE)["latents"], expected)
