"""Stage 2 as a script: the flags and inputs that it refuses, and those that it takes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import BadSettingError
from common.files.stage_table import LATENTS_FILE
from tests.conftest import Run, file_contents
from tests.refusals import call, refusal, refuse_flag, refuse_flags

# Flag, its value, what is said after the flag.
FLAGS = [
    ("eta", "nan", "nan: input should be a finite number"),
    ("batch_size", "0", "0: input should be greater than or equal to 1"),
    ("steps_per_call", "0", "0: input should be greater than or equal to 1"),
    ("warmup_steps", "-1", "-1: input should be greater than or equal to 0"),
    ("operations", "slow", "'slow': input should be 'fast' or 'torchax'"),
    ("repeat", "-1", "-1: input should be greater than or equal to 0"),
    ("save_trajectory", "0", "0: input should be greater than or equal to 1"),
    ("checkpoint_every", "0", "0: input should be greater than or equal to 1"),
    ("profile_steps", "8:5", "'8:5': give the first step and the one after the last, as 5:8"),
]


@pytest.mark.parametrize(("flag", "value", "said"), FLAGS)
def test_a_value_out_of_bounds_names_its_flag_and_the_bound(
    run_dir: Path, flag: str, value: str, said: str
) -> None:
    refuse_flag(run_dir, 2, flag, value, said)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--guidance_end", "0.2", "--guidance_start", "0.8"],
         ["guidance_start 0.8 is after guidance_end 0.2"]),
        (["--dtype", "float32", "--unet_dtype", "float32"],
         ["--dtype", "--unet_dtype", "not both"]),
        (["--topology", "v6e"], ["--topology v6e", "v6e:2x4"]),
        (["--topology", "v6e:1x1", "--repeat", 2], ["--repeat is for a run", "--topology"]),
    ],
)  # fmt: skip
def test_flags_that_do_not_go_together(
    run_dir: Path, arguments: list[str], words: list[str]
) -> None:
    refuse_flags(run_dir, 2, arguments, words)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--scheduler", "dpmpp_2m", "--scheduler_option", "solver_type=x"], ["solver_type", "x"]),
        (["--scheduler", "euler", "--scheduler_option", "x=1"], ["has no such setting"]),
        (["--scheduler", "ddim", "--num_inference_steps", 2000], ["num_inference_steps 2000"]),
        (["--profile_steps", "2:9", "--num_inference_steps", 4], ["the run has 4 steps"]),
    ],
)
def test_a_schedulers_refusal_comes_before_weights_are_read(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, flags: list[object], words: list[str]
) -> None:
    def load(*arguments: object, **named: object) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr("common.sampling.loading.open_denoiser", load)
    before = file_contents(run_dir)
    with refusal(BadSettingError, *words):
        call(2, "--output_dir", run_dir, *flags)
    assert file_contents(run_dir) == before


def test_a_strangers_embeddings_pass_with_a_warning(run_copy: Path, quick_stage: Run) -> None:
    path = run_copy / "stage1_embeddings.safetensors"
    save_file(load_file(path), path, metadata={"dtype_info": "{}"})
    before = load_file(run_copy / LATENTS_FILE)["latents"]
    result = quick_stage(2, "--output_dir", run_copy)
    assert result.returncode == 0, result.stderr
    assert result.stderr.startswith("warning: ") and "cannot be verified" in result.stderr
    assert torch.equal(load_file(run_copy / LATENTS_FILE)["latents"], before)
