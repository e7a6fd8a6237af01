"""Stage 1 as a script: the flags that it refuses, what it says, and that it needs no jax."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import STAGES, Run
from tests.refusals import refuse_flag, refuse_flags

# Flag, its value, what is said after the flag.
FLAGS = [
    ("clip_skip", "0", "0: input should be greater than or equal to 1"),
    ("num_images_per_prompt", "0", "0: input should be greater than or equal to 1"),
    ("num_images_per_prompt", "10001", "10001: input should be less than or equal to 10000"),
    ("num_inference_steps", "10001", "10001: input should be less than or equal to 10000"),
    ("guidance_scale", "-1", "-1.0: input should be greater than or equal to 0"),
    ("guidance_scale", "nan", "nan: input should be a finite number"),
    ("guidance_rescale", "2", "2.0: input should be less than or equal to 1"),
    ("guidance_start", "-0.5", "-0.5: input should be greater than or equal to 0"),
    ("guidance_end", "1.5", "1.5: input should be less than or equal to 1"),
    ("seed", str(2**63), f"{2**63}: input should be less than {2**63}"),
    ("eta", "-1", "-1.0: input should be greater than or equal to 0"),
    ("height", "0", "0: input should be greater than or equal to 8"),
    ("height", "16392", "16392: input should be less than or equal to 16384"),
    ("width", "7", "7: input should be greater than or equal to 8"),
    ("long_prompts", "all", "'all': input should be 'cut' or 'chunk'"),
    ("prompt_weighting", "brackets", "'brackets': input should be 'compel'"),
    ("prompt", "\udcff", "'\\udcff': it holds bytes that are no UTF-8 text"),
    ("model_id", "", "'': it is empty: leave it out, or give a name"),
    ("embedding", "a.safetensors:", "'': string should have at least 1 character"),
    ("lora", "a.safetensors:1..2", "'1..2': input should be a valid number"),
    ("original_size", "64", "'64': give two numbers of pixels, as 1024,1024"),
    ("vae", "a\0b", r"'a\x00b': give a name"),
    ("variant", "fp16/x", "'fp16/x': string should match"),
    ("original_size", "64,b", "'b': input should be a valid integer"),
    ("target_size", "1,2,3", "'1,2,3': give two numbers of pixels, as 1024,1024"),
    ("crops_coords_top_left", "1.5,2", "'1.5': input should be a valid integer"),
    ("negative_original_size", "a,64", "'a': input should be a valid integer"),
    (
        "negative_target_size",
        "1,2,3",
        "'1,2,3': give two numbers of pixels, as 1024,1024",
    ),
    ("negative_crops_coords_top_left", "b,2", "'b': input should be a valid integer"),
    ("timesteps", "999,x", "'x': input should be a valid integer"),
    ("timesteps", "9,-1", "'-1': input should be greater than or equal to 0"),
    ("sigmas", "nan,0", "'nan': input should be a finite number"),
    ("text_encoder_dtype", "int8", "'int8': input should be 'float32' or 'bfloat16'"),
    ("unet_dtype", "int8", "'int8': input should be 'auto', 'float32' or 'bfloat16'"),
    ("vae_dtype", "int8", "'int8': input should be 'auto', 'float32' or 'bfloat16'"),
]


@pytest.mark.parametrize(("flag", "value", "said"), FLAGS)
def test_a_value_out_of_bounds_names_its_flag_and_the_bound(
    run_dir: Path, flag: str, value: str, said: str
) -> None:
    refuse_flag(run_dir, 1, flag, value, said)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--guidance_start", "0.8", "--guidance_end", "0.2"],
         ["guidance_start 0.8 is after guidance_end 0.2"]),
        (["--scheduler_option", "beta_end=.nan"], ["--scheduler_option", "finite numbers"]),
        (["--dtype", "float32", "--text_encoder_dtype", "float32"],
         ["--dtype", "--text_encoder_dtype", "not both"]),
        (["--no_negative_prompt", "--negative_prompt_2", "x"], ["negative_prompt_2 needs a"]),
        (["--prompts_file", "p.txt", "--prompt_2", "x"],
         ["--prompt_2", "--prompts_file", "p.txt can hold prompt_2"]),
    ],
)  # fmt: skip
def test_flags_that_do_not_go_together(
    run_dir: Path, arguments: list[str], words: list[str]
) -> None:
    refuse_flags(run_dir, 1, arguments, words)


def test_a_long_prompt_says_what_was_cut_off(tmp_path: Path, quick_stage: Run) -> None:
    prompt = " ".join(["red"] * 75) + " green blue"
    result = quick_stage(1, "--prompt", prompt, "--output_dir", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    assert "77 tokens" in result.stderr and "'green blue'" in result.stderr


def test_stage_1_runs_where_jax_is_not_installed(tmp_path: Path) -> None:
    """A site folder with every installed package but jax, jaxlib and torchax."""
    site = tmp_path / "site"
    site.mkdir()
    for entry in Path(torch.__file__).parents[1].iterdir():
        if not entry.name.startswith(("jax", "torchax", "__editable__")):
            (site / entry.name).symlink_to(entry)
    environment = os.environ | {"PYTHONPATH": str(site)}
    check = [sys.executable, "-S", "-c", "import jax"]
    assert subprocess.run(check, env=environment, capture_output=True).returncode != 0
    command = [sys.executable, "-S", str(STAGES[1]), "--output_dir", str(tmp_path / "run")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "stage1_embeddings.safetensors").exists()
