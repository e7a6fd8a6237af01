"""Every other way in which a stage refuses: the error's class, and one sentence with the mend.

A class has one exit code (`test_errors_have_the_documented_exit_codes`), and `run_command` ends the
process with it (`test_a_process_ends_with_one_sentence_and_the_code`), so most of these run here
and not in a process of their own.
"""

import dataclasses
import importlib.util
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor
from jax.experimental import topologies
from safetensors.torch import save_file

from common.compute import jax_start, sharding, tpu_compiler
from common.compute.jax_profiler import JaxProfiler
from common.compute.torch_profiler import TorchProfiler
from common.compute.tpu_estimate import CHIPS
from common.errors import (
    BadInputFileError,
    BadSettingError,
    NotFiniteError,
    StageError,
    UnfitEnvironmentError,
    without_controls,
)
from common.files import artifacts, run_lock
from common.files.artifacts import EMBEDDINGS_FILE, LATENTS_FILE, TRAJECTORY_FILE, Recipe
from common.files.kept_progress import Progress
from common.files.report import StageReport
from common.files.run_lock import RunLock
from common.models.checkpoint import open_checkpoint
from common.models.weights import load_model
from common.runs.flags import make_command
from common.runs.generation import (
    GENERATION_CONFIG_FILE,
    RunOptions,
    RunSettings,
    read_prompts_file,
    read_run_settings,
    resolve,
    write_generation_config,
)
from common.sampling.sampler import Sampler
from common.sampling.scheduler_tables import make_tables
from common.stopping import StoppedError, StopRequest
from common.vae.decoder import Decoder
from common.whole_files import remove_file
from stages import stage1_text_encoder, stage2_unet, stage3_vae_decoder
from tests.conftest import DEMO, PROJECT_DIR, Run, file_contents
from tests.in_process import make_config
from tests.tiny_checkpoints import save_sd

COMMANDS = {
    1: make_command(stage1_text_encoder.main),
    2: make_command(stage2_unet.main),
    3: make_command(stage3_vae_decoder.main),
}
WEIGHTS = "diffusion_pytorch_model.safetensors"
Error = type[StageError]


@contextmanager
def refusal(error: Error, *words: str) -> Iterator[None]:
    """The block raises just this class, and its sentence is one line with the words in it."""
    with pytest.raises(StageError) as caught:
        yield
    said = str(caught.value)
    assert type(caught.value) is error, said
    assert "\n" not in said and "Traceback" not in said
    for word in words:
        assert word in said, said


def call(number: int, *arguments: object) -> None:
    """Run a stage's command here."""
    COMMANDS[number].main([*map(str, arguments)], f"stage {number}", standalone_mode=False)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run directory for the demo checkpoint, its embeddings and latents zeros from elsewhere."""
    folder = tmp_path / "run"
    write_generation_config(folder, make_config(DEMO, height=64, width=64))
    save_file(zeros(EMBEDDINGS), folder / EMBEDDINGS_FILE)
    save_file(zeros(LATENTS), folder / LATENTS_FILE)
    return folder


Shapes = dict[str, tuple[int, ...]]
EMBEDDINGS: Shapes = {
    "prompt_embeds": (1, 77, 160),
    "negative_prompt_embeds": (1, 77, 160),
    "pooled_prompt_embeds": (1, 96),
    "negative_pooled_prompt_embeds": (1, 96),
}
LATENTS: Shapes = {"latents": (1, 4, 8, 8)}
TRAJECTORY: Shapes = {"latents": (2, 1, 4, 8, 8), "steps": (2,)}


def zeros(shapes: Shapes, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}


# --- the end of a process -------------------------------------------------------------------------

FAILING_COMMAND = """
from common.runs.flags import make_command, run_command
from common.errors import *

def main(debug: bool = False) -> None:
    raise {error}

run_command(make_command(main))
"""


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        ("BadSettingError('a flag')", 2, ["error: a flag"]),
        ("BadInputFileError('a file')", 3, ["error: a file"]),
        ("NotFiniteError('numbers')", 4, ["error: numbers"]),
        ("UnfitEnvironmentError('a disk')", 5, ["error: a disk"]),
        ("MemoryError", 5, ["out of memory", "--batch_size", "--mesh", "--tile"]),
        (
            "RuntimeError('RESOURCE_EXHAUSTED: Out of memory\\n while allocating 9 bytes')",
            5,
            ["out of memory on the devices", "while allocating 9 bytes", "--batch_size"],
        ),
        ("KeyError('name')", 1, ["a defect of this program: KeyError: 'name'", "--debug"]),
    ],
)
def test_a_process_ends_with_one_sentence_and_the_code(
    error: str, code: int, words: list[str]
) -> None:
    """jax's own error of a device without memory stands in for such a device."""
    result = run_python(FAILING_COMMAND.format(error=error))
    assert result.returncode == code, result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr


def test_debug_shows_where_before_the_sentence() -> None:
    result = run_python(FAILING_COMMAND.format(error="BadSettingError('a flag')"), "--debug")
    assert result.returncode == 2
    assert result.stderr.startswith("Traceback") and result.stderr.endswith("error: a flag\n")


def run_python(code: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=PROJECT_DIR
    )


# --- flags and settings ---------------------------------------------------------------------------

# Stage, flag, its value, what is said after the flag.
FLAGS = [
    (1, "clip_skip", "0", "0: input should be greater than or equal to 1"),
    (1, "num_images_per_prompt", "0", "0: input should be greater than or equal to 1"),
    (1, "num_images_per_prompt", "10001", "10001: input should be less than or equal to 10000"),
    (1, "num_inference_steps", "10001", "10001: input should be less than or equal to 10000"),
    (1, "guidance_scale", "-1", "-1.0: input should be greater than or equal to 0"),
    (1, "guidance_scale", "nan", "nan: input should be a finite number"),
    (1, "guidance_rescale", "2", "2.0: input should be less than or equal to 1"),
    (1, "guidance_start", "-0.5", "-0.5: input should be greater than or equal to 0"),
    (1, "guidance_end", "1.5", "1.5: input should be less than or equal to 1"),
    (1, "seed", str(2**63), f"{2**63}: input should be less than {2**63}"),
    (1, "eta", "-1", "-1.0: input should be greater than or equal to 0"),
    (1, "height", "0", "0: input should be greater than or equal to 8"),
    (1, "height", "16392", "16392: input should be less than or equal to 16384"),
    (1, "width", "7", "7: input should be greater than or equal to 8"),
    (1, "long_prompts", "all", "'all': input should be 'cut' or 'chunk'"),
    (1, "prompt_weighting", "brackets", "'brackets': input should be 'compel'"),
    (1, "prompt", "\udcff", "'\\udcff': it holds bytes that are no UTF-8 text"),
    (1, "model_id", "", "'': it is empty: leave it out, or give a name"),
    (1, "embedding", "a.safetensors:", "'': string should have at least 1 character"),
    (1, "lora", "a.safetensors:1..2", "'1..2': input should be a valid number"),
    (1, "original_size", "64", "'64': give two numbers of pixels, as 1024,1024"),
    (1, "vae", "a\0b", r"'a\x00b': give a name"),
    (1, "variant", "fp16/x", "'fp16/x': string should match"),
    (1, "original_size", "64,b", "'b': input should be a valid integer"),
    (1, "target_size", "1,2,3", "'1,2,3': give two numbers of pixels, as 1024,1024"),
    (1, "crops_coords_top_left", "1.5,2", "'1.5': input should be a valid integer"),
    (1, "negative_original_size", "a,64", "'a': input should be a valid integer"),
    (
        1,
        "negative_target_size",
        "1,2,3",
        "'1,2,3': give two numbers of pixels, as 1024,1024",
    ),
    (1, "negative_crops_coords_top_left", "b,2", "'b': input should be a valid integer"),
    (1, "timesteps", "999,x", "'x': input should be a valid integer"),
    (1, "timesteps", "9,-1", "'-1': input should be greater than or equal to 0"),
    (1, "sigmas", "nan,0", "'nan': input should be a finite number"),
    (1, "text_encoder_dtype", "int8", "'int8': input should be 'float32' or 'bfloat16'"),
    (1, "unet_dtype", "int8", "'int8': input should be 'auto', 'float32' or 'bfloat16'"),
    (1, "vae_dtype", "int8", "'int8': input should be 'auto', 'float32' or 'bfloat16'"),
    (2, "eta", "nan", "nan: input should be a finite number"),
    (2, "batch_size", "0", "0: input should be greater than or equal to 1"),
    (2, "steps_per_call", "0", "0: input should be greater than or equal to 1"),
    (2, "warmup_steps", "-1", "-1: input should be greater than or equal to 0"),
    (2, "operations", "slow", "'slow': input should be 'fast' or 'torchax'"),
    (2, "repeat", "-1", "-1: input should be greater than or equal to 0"),
    (2, "save_trajectory", "0", "0: input should be greater than or equal to 1"),
    (2, "checkpoint_every", "0", "0: input should be greater than or equal to 1"),
    (2, "profile_steps", "8:5", "'8:5': give the first step and the one after the last, as 5:8"),
    (3, "batch_size", "0", "0: input should be greater than or equal to 1"),
]


@pytest.mark.parametrize(("number", "flag", "value", "said"), FLAGS)
def test_a_value_out_of_bounds_names_its_flag_and_the_bound(
    run_dir: Path, number: int, flag: str, value: str, said: str
) -> None:
    before = file_contents(run_dir)
    with refusal(BadSettingError, f"--{flag} {said}"):
        call(number, "--output_dir", run_dir, f"--{flag}", value)
    assert file_contents(run_dir) == before


@pytest.mark.parametrize(
    ("number", "arguments", "words"),
    [
        (1, ["--guidance_start", "0.8", "--guidance_end", "0.2"],
         ["guidance_start 0.8 is after guidance_end 0.2"]),
        (2, ["--guidance_end", "0.2", "--guidance_start", "0.8"],
         ["guidance_start 0.8 is after guidance_end 0.2"]),
        (1, ["--scheduler_option", "beta_end=.nan"], ["--scheduler_option", "finite numbers"]),
        (1, ["--dtype", "float32", "--text_encoder_dtype", "float32"],
         ["--dtype", "--text_encoder_dtype", "not both"]),
        (2, ["--dtype", "float32", "--unet_dtype", "float32"],
         ["--dtype", "--unet_dtype", "not both"]),
        (3, ["--dtype", "float32", "--vae_dtype", "float32"],
         ["--dtype", "--vae_dtype", "not both"]),
        (1, ["--no_negative_prompt", "--negative_prompt_2", "x"], ["negative_prompt_2 needs a"]),
        (1, ["--prompts_file", "p.txt", "--prompt_2", "x"],
         ["--prompt_2", "--prompts_file", "p.txt can hold prompt_2"]),
        (3, ["--json", "x"], ["--json is for --topology"]),
        (2, ["--topology", "v6e"], ["--topology v6e", "v6e:2x4"]),
        (2, ["--topology", "v6e:1x1", "--repeat", 2], ["--repeat is for a run", "--topology"]),
        (3, ["--topology", "v6e:1x1", "--profile_dir", "x"], ["--profile_dir is for a run"]),
        (3, ["--topology", "v6e:1x1", "--wait"], ["--wait is for a run, and --topology only"]),
        (3, ["--topology", "v9:2x2"], ["--topology v9:2x2", "chips: v6e"]),
        (3, ["--mesh", "cfg=3"], ["--mesh cfg=3", "1 or 2"]),
    ],
)  # fmt: skip
def test_flags_that_do_not_go_together(
    run_dir: Path, number: int, arguments: list[str], words: list[str]
) -> None:
    before = file_contents(run_dir)
    with refusal(BadSettingError, *words):
        call(number, "--output_dir", run_dir, *arguments)
    assert file_contents(run_dir) == before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prompt: []", ["no prompt", "--prompt", "--prompts_file"]),
        ("num_inference_steps: null", ["config.yaml", "num_inference_steps, timesteps, sigmas"]),
        ("guidance_start: 0.8\nguidance_end: 0.2", ["config.yaml", "is after guidance_end 0.2"]),
        ("scheduler_options: {a: .inf}", ["config.yaml: scheduler_options", "finite numbers"]),
        ("scheduler_options: 3", ["config.yaml: scheduler_options 3", "dictionary"]),
        ("loras: [{file: a, strength: 2}]", ["config.yaml", "loras.0.strength"]),
        ("embeddings: [{file: a}]", ["config.yaml", "embeddings.0.token is missing"]),
        ("prompt: [a, 3]", ["config.yaml: prompt.1 3", "string"]),
    ],
)
def test_a_bad_setting_in_a_file_is_named_with_the_file(
    tmp_path: Path, text: str, words: list[str]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with refusal(BadSettingError, *words):
        resolve(read_run_settings(file, {}), native_size=128, size_factor=8)


def test_a_setting_that_no_run_has_cannot_be_overridden() -> None:
    with refusal(BadSettingError, "not a setting of a run: prompts_file, wait"):
        make_config(DEMO).override({"wait": True, "seed": 1, "prompts_file": "x"})


# --- text files -----------------------------------------------------------------------------------


def make_nothing(path: Path) -> None:
    """No file."""


def make_folder(path: Path) -> None:
    path.mkdir()


def make_latin_1(path: Path) -> None:
    path.write_bytes("prompt: grün".encode("latin-1"))


def make_huge(path: Path) -> None:
    path.touch()
    os.truncate(path, 64_000_001)


@pytest.mark.parametrize("flag", ["config", "prompts_file"])
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (make_nothing, "does not exist"),
        (make_folder, "cannot be read: [Errno 21] Is a directory"),
        (make_latin_1, "cannot be read: 'utf-8' codec can't decode"),
        (make_huge, "cannot be read: it is larger than"),
    ],
)
def test_a_text_file_that_cannot_be_read(
    tmp_path: Path, flag: str, make: Callable[[Path], None], words: str
) -> None:
    path = tmp_path / "file"
    make(path)
    with refusal(BadInputFileError, f"--{flag} {path} {words}"):
        call(1, "--output_dir", tmp_path / "run", f"--{flag}", path)
    assert not (tmp_path / "run").exists()


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: [1", "while parsing"),
        ("seed: 2020-13-45", "month must be in 1..12"),
        ("seed: !!int x", "invalid literal for int()"),
        ("prompt: &a [x]\nprompt_2: *a", "write the alias's value out"),
        (DEEP, "nested too deeply"),
    ],
)
def test_a_config_file_that_is_not_plain(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with refusal(BadInputFileError, f"--config {file} is not YAML", words):
        read_run_settings(file, {})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"prompt": "a"', "is not JSON: Expecting"),
        ('{"prompt": "a", "seed": ' + "9" * 5000 + "}", "is not JSON: Exceeds the limit"),
        (DEEP, "is not JSON: it is nested too deeply"),
        ("[1]", "is not a JSON object"),
        ('{"prompt": null}', ": prompt None: input should be a valid string"),
        ('{"prompt": "a", "seed": -1}', ": seed -1: input should be greater than or equal to 0"),
        ('{"prompt": "a", "negative_prompt": null, "negative_prompt_2": "b"}',
         ": negative_prompt_2 needs a negative_prompt"),
    ],
)  # fmt: skip
def test_a_bad_line_of_a_prompts_file_is_named(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n\n' + text + "\n")
    with refusal(BadSettingError, f"{file}, line 3{'' if words[0] == ':' else ' '}{words}"):
        read_prompts_file(file, RunSettings())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff", "is damaged ('utf-8' codec"),
        (b"[1, 2", "is damaged (Expecting"),
        (b"[1, 2]", "valid dictionary"),
        (DEEP.encode(), "is damaged (it is nested too deeply)"),
        (b'{"prompts": []}', "prompts []: tuple should have at least 1 item"),
        (
            b'{"prompts": [{"prompt": "a", "negative_prompt": null}], "height": 64, "width": 64, '
            b'"num_inference_steps": null}',
            "give one of num_inference_steps, timesteps, sigmas, not 0 of them",
        ),
    ],
)
def test_a_damaged_generation_config(run_dir: Path, content: bytes, words: str) -> None:
    path = run_dir / GENERATION_CONFIG_FILE
    path.write_bytes(content)
    for number in (2, 3):
        with refusal(BadInputFileError, str(path), words, "run stage 1 to make it: python stages"):
            call(number, "--output_dir", run_dir)


# --- checkpoints ----------------------------------------------------------------------------------


def removed(name: str) -> Callable[[Path], None]:
    def remove(model: Path) -> None:
        path = model / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return remove


def written(name: str, content: bytes) -> Callable[[Path], None]:
    def write(model: Path) -> None:
        (model / name).write_bytes(content)

    return write


def changed(name: str, **values: object) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        content = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps(content | values))

    return change


@pytest.mark.parametrize(
    ("number", "damage", "error", "words"),
    [
        (1, removed("model_index.json"), BadInputFileError,
         ["model_index.json is missing", "in diffusers' layout"]),
        (1, removed("vae"), BadInputFileError, ["vae/config.json is missing"]),
        (2, removed("unet/config.json"), BadInputFileError, ["unet/config.json is missing"]),
        (2, removed("scheduler"), BadInputFileError, ["scheduler_config.json is missing"]),
        (2, written("unet/config.json", b"{"), BadInputFileError,
         ["unet/config.json is damaged: Expecting"]),
        (3, written("vae/config.json", b"\xff"), BadInputFileError,
         ["vae/config.json is damaged: 'utf-8'"]),
        (3, written("vae/config.json", DEEP.encode()), BadInputFileError,
         ["vae/config.json is damaged: it is nested too deeply"]),
        (3, written("vae/config.json", b"[1]"), BadInputFileError,
         ["vae/config.json is damaged: it is not a JSON object"]),
        (1, removed("tokenizer"), BadInputFileError,
         ["--model_id", "has no folder", "tokenizer", "restore it or choose another"]),
        (1, changed("model_index.json", text_encoder=["transformers", "T5EncoderModel"]),
         BadSettingError, ["--model_id", "its text_encoder is a T5EncoderModel", "CLIPTextModel"]),
        (2, changed("unet/config.json", addition_embed_type="image"), BadSettingError,
         ["--model_id", "its UNet has addition_embed_type image", "supported: None, text_time"]),
        (2, changed("unet/config.json", encoder_hid_dim_type="text_proj"), BadSettingError,
         ["its UNet has encoder_hid_dim_type text_proj", "supported: None"]),
        (2, changed("unet/config.json", class_embed_type="timestep"), BadSettingError,
         ["its UNet has class_embed_type timestep", "supported: None"]),
        (1, changed("model_index.json", text_encoder="CLIPTextModel"), BadInputFileError,
         ["model_index.json cannot be used (text_encoder: give a library and a", "restore it"]),
        (1, changed("vae/config.json", block_out_channels=[]), BadInputFileError,
         ["vae/config.json cannot be used (block_out_channels: List should have", "restore it"]),
        (1, changed("unet/config.json", sample_size=None), BadInputFileError,
         ["unet/config.json cannot be used (sample_size: Input should be", "restore it"]),
        (1, changed("text_encoder/config.json", num_hidden_layers="x"), BadInputFileError,
         ["text_encoder/config.json cannot be used (num_hidden_layers: Input", "restore it"]),
        (2, changed("unet/config.json", addition_time_embed_dim=None), BadInputFileError,
         ["unet/config.json cannot be used", "text_time needs addition_time_embed_dim"]),
        (2, changed("unet/config.json", in_channels=0), BadInputFileError,
         ["unet/config.json cannot be used (in_channels: Input should be", "restore it"]),
        (2, changed("scheduler/scheduler_config.json", _class_name=None), BadInputFileError,
         ["scheduler_config.json cannot be used (_class_name: Input should be", "restore it"]),
        (3, changed("vae/config.json", scaling_factor="x"), BadInputFileError,
         "scaling_factor: Input should be a valid number"),
        (3, changed("vae/config.json", latent_channels=None), BadInputFileError,
         ["vae/config.json cannot be used (latent_channels: Input should be", "restore it"]),
        (1, written("tokenizer/tokenizer.json", b"{"), BadInputFileError,
         ["tokenizer cannot be loaded", "restore it, or choose another", "--model_id"]),
        (1, written("text_encoder/model.safetensors", b"none"), BadInputFileError,
         ["text_encoder cannot be loaded", "restore it, or choose another", "--model_id"]),
    ],
)  # fmt: skip
def test_a_damaged_or_foreign_checkpoint(
    demo_copy: Path,
    run_dir: Path,
    number: int,
    damage: Callable[[Path], None],
    error: Error,
    words: list[str],
) -> None:
    damage(demo_copy)
    before = file_contents(run_dir)
    with refusal(error, str(demo_copy), *words):
        call(number, "--output_dir", run_dir, "--model_id", demo_copy)
    assert file_contents(run_dir) == before


@pytest.mark.parametrize("name", ["unet", "vae"])
@pytest.mark.parametrize("form", ["folder", "file"])
def test_weights_that_are_no_safetensors(demo_copy: Path, name: str, form: str) -> None:
    file = demo_copy / name / WEIGHTS
    file.write_bytes(b"none")
    source = file if form == "file" else demo_copy / name
    settings = RunSettings.model_validate({"model_id": str(DEMO), name: str(source)})
    checkpoint = open_checkpoint(settings, [name])
    with refusal(BadInputFileError, f"{source} cannot be loaded", f"than --{name} {source}"):
        load_model(checkpoint, name, torch.float32)


@pytest.mark.parametrize(
    ("flags", "error", "words"),
    [
        (["--variant", "fp16"], BadSettingError, ["--variant is for checkpoints in folders"]),
        (["--revision", "v1"], BadSettingError, ["--revision is for hub ids", "is a file"]),
        ([], BadInputFileError, ["one.safetensors cannot be loaded", "--model_id"]),
    ],
)
def test_a_checkpoint_of_one_file(
    tmp_path: Path, flags: list[str], error: Error, words: list[str]
) -> None:
    file = tmp_path / "one.safetensors"
    file.write_bytes(b"none")
    with refusal(error, *words):
        call(
            *(1, "--output_dir", tmp_path / "run", "--model_id", file),
            *("--single_file_config", DEMO, *flags),
        )
    assert not (tmp_path / "run").exists() or not file_contents(tmp_path / "run")


@pytest.mark.parametrize(
    ("number", "flag", "value", "error", "words"),
    [
        (1, "embedding", "no.safetensors", BadInputFileError,
         ["is no safetensors file", "FILE or FILE:TOKEN"]),
        (2, "lora", "no.safetensors", BadInputFileError,
         ["is no safetensors file", "FILE or FILE:SCALE"]),
        (3, "vae", "no such thing", BadSettingError,
         ["neither an existing folder or .safetensors file nor a hub id"]),
        (2, "single_file_config", "x", BadSettingError, ["is for a --model_id that is one"]),
        (1, "revision", "v1", BadSettingError, ["is for hub ids", "is a folder"]),
    ],
)  # fmt: skip
def test_a_part_that_is_nowhere(
    run_dir: Path, number: int, flag: str, value: str, error: Error, words: list[str]
) -> None:
    before = file_contents(run_dir)
    with refusal(error, f"--{flag}", *words):
        call(number, "--output_dir", run_dir, f"--{flag}", value)
    assert file_contents(run_dir) == before


@pytest.mark.parametrize(
    ("number", "flag", "value"),
    [
        (1, "model_id", "who/knows"),
        (1, "lora", "who/knows/this.safetensors"),
        (1, "embedding", "who/knows/this.safetensors"),
        (2, "unet", "who/knows/this.safetensors"),
        (2, "lora", "who/knows/this.safetensors"),
        (3, "vae", "who/knows/this.safetensors"),
    ],
)
def test_a_part_that_the_hub_does_not_give(
    run_dir: Path, number: int, flag: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's library has read already that tests are offline; the sentence depends on now."""
    before = file_contents(run_dir)
    said = f"--{flag} {value} is not on this machine"
    with refusal(UnfitEnvironmentError, said, "--offline (or HF_HUB_OFFLINE=1)", "fetch it once"):
        call(number, "--output_dir", run_dir, f"--{flag}", value)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with refusal(UnfitEnvironmentError, said, "cannot be had from", "the name and the network"):
        call(number, "--output_dir", run_dir, f"--{flag}", value)
    assert file_contents(run_dir) == before


def test_a_damaged_lora_names_the_mend(run_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "style.safetensors"
    file.write_bytes(b"none")
    for number in (1, 2):
        with refusal(BadInputFileError, f"--lora {file} is damaged", "get it again"):
            call(number, "--output_dir", run_dir, "--lora", file)


def test_a_damaged_embedding_names_the_mend(tmp_path: Path) -> None:
    file = tmp_path / "style.safetensors"
    file.write_bytes(b"none")
    with refusal(BadInputFileError, f"--embedding {file}", "SafetensorError", "FILE:TOKEN"):
        call(1, "--output_dir", tmp_path / "run", "--embedding", file)


def test_a_lora_for_a_text_encoder_that_is_not_there(tmp_path: Path) -> None:
    model, file = save_sd(tmp_path / "sd"), tmp_path / "xl.safetensors"
    save_file({"lora_te2_text_model_encoder_layers_0.alpha": torch.zeros(1)}, file)
    with refusal(
        BadInputFileError, f"--lora {file} changes text_encoder_2", "choose a LoRA for this family"
    ):
        call(1, "--output_dir", tmp_path / "run", "--model_id", model, "--lora", file)


# --- the files of tensors -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"pooled_prompt_embeds": None}, "lacks pooled_prompt_embeds, which the checkpoint's UNet"),
        ({"prompt_embeds": (1, 77, 80)}, "(1, 77, 80); the checkpoint's UNet needs a width of 160"),
        ({"prompt_embeds": (77, 160)}, "prompt_embeds of shape (77, 160)"),
        ({"negative_pooled_prompt_embeds": (1, 80)}, "(1, 80); the checkpoint's UNet needs a"),
        ({name: (2, *shape[1:]) for name, shape in EMBEDDINGS.items()},
         "holds 2 prompts; generation_config.json has 1"),
        (dict.fromkeys(("prompt_embeds", "negative_prompt_embeds"), (1, 0, 160)),
         "prompt_embeds of shape (1, 0, 160)"),
        ({"prompt_embeds": (1, 154, 160)}, "prompt_embeds and negative_prompt_embeds of different"),
    ],
)  # fmt: skip
def test_embeddings_that_do_not_fit(
    run_dir: Path, shapes: dict[str, tuple[int, ...] | None], words: str
) -> None:
    path = run_dir / EMBEDDINGS_FILE
    wanted = {name: shape for name, shape in (EMBEDDINGS | shapes).items() if shape is not None}
    save_file(zeros(wanted), path)
    with refusal(BadInputFileError, str(path), words, "make it again: python stages/stage1_text"):
        call(2, "--output_dir", run_dir)


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"latent": (1, 4, 8, 8)}, "lacks latents"),
        ({"latents": (1, 3, 8, 8)}, "latents of shape (1, 3, 8, 8); the VAE needs 4 channels"),
        ({"latents": (4, 8, 8)}, "latents of shape (4, 8, 8)"),
        ({"latents": (0, 4, 8, 8)}, "latents of shape (0, 4, 8, 8)"),
    ],
)
def test_latents_that_do_not_fit(run_dir: Path, shapes: Shapes, words: str) -> None:
    path = run_dir / LATENTS_FILE
    save_file(zeros(shapes), path)
    with refusal(BadInputFileError, str(path), words, "make it again: python stages/stage2_unet"):
        call(3, "--output_dir", run_dir)


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"latents": (2, 1, 4, 8, 8)}, "lacks steps"),
        ({"latents": (2, 1, 4, 8, 9), "steps": (2,)}, "those of the run are (1, 4, 8, 8)"),
        ({"latents": (3, 1, 4, 8, 8), "steps": (2,)}, "latents of shape (3, 1, 4, 8, 8)"),
        ({"latents": (0, 1, 4, 8, 8), "steps": (0,)}, "latents of shape (0, 1, 4, 8, 8)"),
    ],
)
def test_a_trajectory_that_does_not_fit(run_dir: Path, shapes: Shapes, words: str) -> None:
    path = run_dir / TRAJECTORY_FILE
    save_file(zeros(shapes), path)
    with refusal(BadInputFileError, str(path), words, "make it again", "--save_trajectory N"):
        call(3, "--output_dir", run_dir)


@pytest.mark.parametrize(
    ("number", "name", "shapes"),
    [
        (2, EMBEDDINGS_FILE, EMBEDDINGS),
        (3, LATENTS_FILE, LATENTS),
        (3, TRAJECTORY_FILE, TRAJECTORY),
    ],
)
def test_whole_numbers_are_no_tensors_of_ours(
    run_dir: Path, number: int, name: str, shapes: Shapes
) -> None:
    save_file(zeros(shapes, torch.int32), run_dir / name)
    with refusal(BadInputFileError, name, "as I32, not as floating-point numbers", "make it again"):
        call(number, "--output_dir", run_dir)


@pytest.mark.parametrize(
    ("number", "name", "shapes"), [(2, EMBEDDINGS_FILE, EMBEDDINGS), (3, LATENTS_FILE, LATENTS)]
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_not_used(
    run_dir: Path, number: int, name: str, shapes: Shapes, value: float
) -> None:
    key = next(iter(shapes))
    tensors = zeros(shapes)
    tensors[key].view(-1)[0] = value
    save_file(tensors, run_dir / name)
    size = tensors[key].numel()
    path = run_dir / name
    with refusal(
        NotFiniteError, f"{path} cannot be used: 1 of {size} values of '{key}'", "--dtype float32"
    ):
        artifacts.load_tensors(artifacts.inspect(path), lambda _: None)


def write_layout(path: Path, entries: dict[str, Any], data: bytes) -> None:
    """Write a safetensors file by hand, also one that the library would not write."""
    header = json.dumps(entries).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def entry(dtype: str, shape: list[int], begin: int, end: float) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


ONE = {"latents": entry("F32", [1], 0, 4)}


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"a": entry("F32", [1], -12, 4)}, "its tensors lie outside its data"),
        ({"a": entry("F32", [1], 4, 0), **ONE}, "its tensors lie outside its data"),
        ({"latents": entry("F32", [1], 0, 8)}, "it has"),
        ({"latents": {"dtype": "F32"}}, "'shape'"),
        ({"latents": entry("F32", [1], 0, math.inf)}, "cannot convert float infinity"),
        ({"__metadata__": [1], **ONE}, "not a safetensors file"),
        ({"__metadata__": {artifacts.HEADER_KEY: "{}"}, **ONE},
         "its header cannot be read (recipe: Field required)"),
        ({"__metadata__": {artifacts.HEADER_KEY: "no JSON"}, **ONE},
         "its header cannot be read (Invalid JSON"),
        ({"latents": entry("F99", [1], 0, 4)}, "holds 'latents' as F99, which no stage reads"),
        ({"latents": entry("F32", [3], 0, 4)}, "it holds 4 bytes for 'latents', F32 of (3,)"),
        ({"latents": entry("F6_E2M3", [4], 0, 3), "b": entry("U8", [1], 3, 4)}, "F6_E2M3"),
        ({**ONE, "b": entry("F4", [0], 4, 4)}, "holds 'b' as F4, which no stage reads"),
    ],
)  # fmt: skip
def test_a_forged_file_of_tensors(tmp_path: Path, entries: dict[str, Any], words: str) -> None:
    """What our reader does not find, safetensors' does."""
    path = tmp_path / LATENTS_FILE
    write_layout(path, entries, b"data")
    with refusal(BadInputFileError, str(path), words, f"--output_dir {tmp_path}"):
        artifacts.load_tensors(artifacts.inspect(path), lambda _: None)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ((2**40).to_bytes(8, "little") + b"{}", "its header is longer than the file"),
        ((100_000).to_bytes(8, "little") + DEEP.encode(), "it is nested too deeply"),
        (b"1234", "requires a buffer of 8 bytes"),
        (b"", "requires a buffer of 8 bytes"),
    ],
)
def test_a_file_that_begins_like_no_safetensors(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / EMBEDDINGS_FILE
    path.write_bytes(content)
    with refusal(
        BadInputFileError, str(path), words, f"stage1_text_encoder.py --output_dir {tmp_path}"
    ):
        artifacts.inspect(path)


def save_with_header(
    path: Path, shapes: Shapes, stage: int, inputs: dict[str, str], **settings: object
) -> None:
    """Write tensors of zeros as a stage of ours would have."""
    recipe = Recipe(stage=stage, settings=settings, inputs=inputs, weights={}, versions={})
    artifacts.save_tensors(path, zeros(shapes), recipe, {})


OF_ONE_IMAGE: dict[str, Any] = {
    **{key: ["a"] for key in ("prompts", "prompts_2", "negative_prompts", "negative_prompts_2")},
    "num_images_per_prompt": 1,
    "seeds": [42],
}


@pytest.mark.parametrize(
    ("stage", "inputs", "settings", "words"),
    [
        (1, {}, {}, "says that stage 1 made it"),
        (2, {}, {"prompts": "a"}, "has no usable prompts in its header"),
        (2, {}, {"num_images_per_prompt": 0}, "has no usable num_images_per_prompt in its header"),
        (2, {}, {"prompts_2": []}, "has not as many prompts_2 as prompts in its header"),
        (2, {}, {"seeds": [1, 2]}, "holds latents of 1 images, its header names 2 seeds"),
        (2, {"other": "0"}, {}, "says that it was made from 'other', which no stage makes"),
        (2, {EMBEDDINGS_FILE: "0" * 64}, {}, "was made from other data (checksum 000000000000…)"),
    ],
)
def test_latents_whose_header_does_not_fit(
    run_dir: Path, stage: int, inputs: dict[str, str], settings: dict[str, Any], words: str
) -> None:
    path = run_dir / LATENTS_FILE
    save_with_header(path, LATENTS, stage, inputs, **(OF_ONE_IMAGE | settings))
    with refusal(BadInputFileError, f"{path} {words}", "make it again: python stages/stage2_unet"):
        call(3, "--output_dir", run_dir)


def test_embeddings_of_another_stage(run_dir: Path) -> None:
    path = run_dir / EMBEDDINGS_FILE
    save_with_header(path, EMBEDDINGS, 2, {})
    with refusal(BadInputFileError, f"{path} says that stage 2 made it", "make it again: python"):
        call(2, "--output_dir", run_dir)


def test_a_file_that_is_cut_short_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process cuts it after its layout was read."""
    path = tmp_path / LATENTS_FILE
    save_file(zeros(LATENTS), path)
    read_layout = artifacts._read_layout

    def read_then_cut(path: Path) -> Any:
        layout = read_layout(path)
        os.truncate(path, path.stat().st_size - 1)
        return layout

    monkeypatch.setattr(artifacts, "_read_layout", read_then_cut)
    with refusal(BadInputFileError, f"{path} is cut short", "make it again: python stages/stage2"):
        artifacts.inspect(path)


# --- the run directory ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [run_lock.RUN_LOCK, run_lock.STAGE_LOCK])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_lock_that_cannot_be_used(run_dir: Path, number: int, name: str) -> None:
    (run_dir / name).mkdir()
    with refusal(UnfitEnvironmentError, f"{run_dir / name} cannot be used", "--output_dir"):
        call(number, "--output_dir", run_dir)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_run_directory_in_use(run_dir: Path, number: int) -> None:
    """The holder is this process, which says who it is like any other."""
    holder = RunLock(run_dir, wait=False, names=(run_lock.RUN_LOCK,))
    holder.acquire()
    with refusal(
        UnfitEnvironmentError, f"{run_dir} is in use by", f"process {os.getpid()}", "--wait"
    ):
        call(number, "--output_dir", run_dir)
    (run_dir / run_lock.RUN_LOCK).write_text("damaged")
    with refusal(UnfitEnvironmentError, f"{run_dir} is in use by another process", "--wait"):
        call(number, "--output_dir", run_dir)
    holder.release()


def test_an_output_folder_that_is_a_file(run_dir: Path) -> None:
    file = run_dir / EMBEDDINGS_FILE
    content = file.read_bytes()
    with refusal(UnfitEnvironmentError, f"--output_dir {file} is a file", "choose a folder"):
        call(1, "--output_dir", file)
    assert file.read_bytes() == content


def test_a_file_of_ours_that_cannot_be_removed(tmp_path: Path) -> None:
    path = tmp_path / TRAJECTORY_FILE
    path.mkdir()
    with refusal(UnfitEnvironmentError, f"{path} cannot be removed", "another --output_dir"):
        remove_file(path)


def test_progress_that_cannot_be_kept(tmp_path: Path) -> None:
    (tmp_path / "stage2_progress").write_text("")
    with refusal(UnfitEnvironmentError, "stage2_progress", "cannot be written", "--output_dir"):
        Progress(tmp_path, 2, {}).save_group(0, zeros(LATENTS))


@pytest.mark.parametrize(
    ("number", "word", "code"),
    [(signal.SIGINT, "interrupted", 130), (signal.SIGTERM, "terminated", 143)],
)
def test_a_stop_that_was_asked_for_has_its_signals_code(number: int, word: str, code: int) -> None:
    request = StopRequest()
    request.raise_if_asked("after nothing")
    request.number = number
    with pytest.raises(StoppedError) as caught:
        request.raise_if_asked("after 3 images")
    assert (str(caught.value), caught.value.exit_code) == (f"{word} after 3 images", code)


# --- computing ------------------------------------------------------------------------------------


class Wasteful(EulerAncestralDiscreteScheduler):
    """A scheduler that draws two noises in a step."""

    def step(self, *args: Any, generator: Any = None, **options: Any) -> Any:
        for _ in range(2):
            randn_tensor(args[0].shape, generator=generator)
        return super().step(*args, generator=generator, **options)


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
    def load(*arguments: object) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr(stage2_unet, "load_denoiser", load)
    before = file_contents(run_dir)
    with refusal(BadSettingError, *words):
        call(2, "--output_dir", run_dir, *flags)
    assert file_contents(run_dir) == before


def test_a_scheduler_that_draws_too_many_noises() -> None:
    with refusal(BadSettingError, "Wasteful draws more noises than it has evaluations"):
        make_tables(Sampler(Wasteful(), num_inference_steps=4))


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    """The demo checkpoint's VAE on one device."""
    config = make_config(DEMO, height=64, width=64)
    checkpoint = open_checkpoint(config, ["vae"])
    options = RunOptions(mesh="single")
    return stage3_vae_decoder.load_decoder(
        "jax", (1, 4, 8, 8), config, checkpoint, "float32", options, StageReport(3)
    )


def test_a_vae_that_gives_infinities(decoder: Decoder) -> None:
    """Latents that are finite, and so large that the VAE's arithmetic is not."""
    latents = np.full((1, 4, 8, 8), 1e38, np.float32)
    with refusal(
        NotFiniteError, "the VAE in float32", "no picture was written", "--vae_dtype float32"
    ):
        stage3_vae_decoder.decode_groups(decoder, latents, RunOptions(batch_size=1))


def test_a_decoding_that_is_stopped_keeps_its_pictures(decoder: Decoder, tmp_path: Path) -> None:
    progress, stop = Progress(tmp_path, 3, {}), StopRequest()
    stop.number = signal.SIGTERM
    latents = np.zeros((2, 4, 8, 8), np.float32)
    with refusal(
        StoppedError, "terminated after 1 of 2 images, which are kept", "the same command goes on"
    ):
        stage3_vae_decoder.decode_groups(
            decoder, latents, RunOptions(batch_size=1), progress=progress, stop=stop
        )
    assert progress.read_group(0) is not None


def test_a_trace_that_cannot_be_begun(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "stage2"
    with refusal(
        UnfitEnvironmentError,
        f"--profile: no trace can be written to {folder}",
        "choose another --profile_dir",
    ):
        JaxProfiler(folder, None, StageReport(2), {}, torch.nn.Identity()).start()


def test_a_trace_that_cannot_be_ended(tmp_path: Path) -> None:
    """The folder became a file while the trace ran."""
    folder = tmp_path / "profile" / "stage2"
    profiler = JaxProfiler(folder, None, StageReport(2), {}, torch.nn.Identity())
    profiler.start()
    shutil.rmtree(tmp_path / "profile")
    (tmp_path / "profile").write_text("")
    with refusal(
        UnfitEnvironmentError,
        f"--profile: no trace can be written to {folder}",
        "choose another --profile_dir",
    ):
        profiler.stop()


def test_a_trace_of_torch_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "stage1"
    profiler = TorchProfiler(folder / "trace.json.gz", None, StageReport(1), {})
    profiler.start()
    with refusal(UnfitEnvironmentError, f"--profile: {folder}", "choose another --profile_dir"):
        profiler.stop()


def test_a_platform_that_is_not_there(
    run_dir: Path, stage: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "rocm")
    before = file_contents(run_dir)
    result = stage(3, "--output_dir", run_dir)
    assert result.returncode == 5, result.stderr
    assert result.stderr.startswith("error: jax finds no device (Unable to initialize backend")
    assert "run on the CPU with JAX_PLATFORMS=cpu" in result.stderr
    assert result.stderr.count("\n") == 1
    assert file_contents(run_dir) == before


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError(
            f"ABORTED: The TPU is already in use by process with pid {os.getpid()}. Not "
            "attempting to load libtpu.so in this process."),
         [f"with pid {os.getpid()}", "which runs", Path(sys.executable).name, "free the device"]),
        (RuntimeError("The TPU is already in use by process with pid 4194305."), ["pid 4194305."]),
        (AssertionError(), ["JAX_PLATFORMS=cpu", "install jax for it"]),
    ],
)  # fmt: skip
def test_a_device_that_is_taken_or_not_supported(
    error: Exception, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """libtpu's own message, which names the holder; jax's for a platform without its plugin."""

    def refuse() -> None:
        raise error

    monkeypatch.setattr(jax, "devices", refuse)
    with refusal(UnfitEnvironmentError, "jax finds no device", *words):
        jax_start.find_devices()


@pytest.mark.parametrize(
    "error",
    [
        ValueError("coordinator_address should be defined."),
        RuntimeError("jax.distributed.initialize() must be\ncalled before any JAX calls"),
    ],
)
def test_processes_that_do_not_find_each_other(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """jax's own errors, for no test may wait for a cluster."""
    place = "auto"

    def refuse(**_: object) -> None:
        raise error

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    with refusal(
        UnfitEnvironmentError,
        f"--distributed {place}: the processes do not find each other",
        " ".join(str(error).split()),
        "HOST:PORT,COUNT,INDEX",
    ):
        jax_start.join_processes(place)


def test_a_files_own_text_cannot_break_the_line_or_steer_the_terminal() -> None:
    assert without_controls("a\nb\x1b[2Jc → é") == r"a\nb\x1b[2Jc → é"


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        return int(server.getsockname()[1])


def test_a_first_process_that_does_not_answer() -> None:
    address = f"localhost:{free_port()}"
    with refusal(UnfitEnvironmentError, f"{address} does not answer", "start the first process"):
        jax_start.meet_at(address, is_first=False, patience=0.1)


def test_an_address_that_is_none() -> None:
    with refusal(UnfitEnvironmentError, "nosuch.invalid:1234 cannot be used", "a free port"):
        jax_start.meet_at("nosuch.invalid:1234", is_first=False)
    with refusal(BadSettingError, "--distributed localhost:99999,2,0 is not understood"):
        jax_start.join_processes("localhost:99999,2,0")


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
        jax_start.meet_at(address, is_first=False)  # somebody answers
        with refusal(UnfitEnvironmentError, f"{address} cannot be used", "in use"):
            jax_start.meet_at(address, is_first=True)


# --- a TPU that is not there ----------------------------------------------------------------------


@pytest.mark.parametrize("number", [2, 3])
def test_no_tpu_compiler(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "libtpu", None)
    assert importlib.util.find_spec("libtpu") is None
    with refusal(UnfitEnvironmentError, "--topology needs the TPU compiler", "pip install"):
        call(number, "--topology", "v6e:1x1")


@pytest.fixture
def as_if_tpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The devices of this process stand in for a topology's, which need the compiler."""
    monkeypatch.setattr(tpu_compiler, "prepare_environment", lambda: None)
    monkeypatch.setattr(tpu_compiler, "devices_of", lambda _: jax.devices()[:1])


@pytest.mark.parametrize("shape", ["8,8", "0,64,64", "1x64x64", "1,-8,8"])
def test_a_shape_that_is_not_understood(as_if_tpu: None, shape: str) -> None:
    with refusal(BadSettingError, f"--pictures_shape {shape}", "N,HEIGHT,WIDTH"):
        call(3, "--topology", "v6e:1x1", "--pictures_shape", shape)


def test_a_shape_that_the_checkpoint_cannot_have(as_if_tpu: None) -> None:
    with refusal(BadSettingError, "--pictures_shape 1,100,64", "multiples of 8"):
        call(3, "--topology", "v6e:1x1", "--pictures_shape", "1,100,64")


def test_a_scheduler_that_no_program_holds(as_if_tpu: None) -> None:
    with refusal(
        BadSettingError,
        "--topology compiles schedulers that are data; DDIMScheduler steps on the host",
        "choose another --scheduler",
    ):
        call(
            *(2, "--topology", "v6e:1x1", "--model_id", DEMO, "--scheduler", "ddim"),
            *("--scheduler_option", "clip_sample=true", "--num_inference_steps", 3),
        )


def test_a_grid_that_the_compiler_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler's own error, where there is no compiler to give it."""

    def refuse(**_: object) -> None:
        raise RuntimeError("INVALID_ARGUMENT: topology 3x5\n is not supported")

    monkeypatch.setattr(topologies, "get_topology_desc", refuse)
    with refusal(
        BadSettingError,
        "--topology v6e:3x5: the TPU compiler refuses it",
        "topology 3x5 is not supported",
        "choose another grid",
    ):
        tpu_compiler.devices_of("v6e:3x5")


@dataclasses.dataclass
class Lowered:
    """A traced program whose compilation fails as the TPU compiler's does."""

    said: str

    def compile(self) -> None:
        raise RuntimeError(self.said)


def compile_failing(said: str, folder: Path) -> None:
    mesh = sharding.make_mesh(sharding.SINGLE, jax.devices())
    tpu_compiler.compile_and_say(
        lambda: Lowered(said),
        CHIPS["v5e"],
        mesh,
        title="one step of models/demo",
        images=1,
        steps=1,
        topology="v5e:1x1",
        hlo_file=folder / "program.txt",
        json_file=folder / "estimate.json",
    )


def test_a_program_that_does_not_fit_into_the_chip(tmp_path: Path) -> None:
    """The compiler's own error of a program that is too large, and any other one of it."""
    gigabytes = CHIPS["v5e"].memory_bytes / 1e9
    with refusal(
        UnfitEnvironmentError,
        f"one step of models/demo does not fit into the {gigabytes:.0f} GB of a v5e",
        "Used 40.1G of 15.7G hbm",
        "fewer pictures at once, or more chips",
    ):
        compile_failing("RESOURCE_EXHAUSTED: Ran out of memory:\nUsed 40.1G of 15.7G hbm", tmp_path)
    with pytest.raises(RuntimeError, match="INTERNAL"):
        compile_failing("INTERNAL: a defect of the compiler", tmp_path)
    assert not list(tmp_path.iterdir())
