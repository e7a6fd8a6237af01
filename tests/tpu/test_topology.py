"""Compile for TPUs that are not there, with the compiler in the libtpu wheel."""

import json
import math
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.compute import tpu_compiler
from common.compute.chips import CHIPS
from common.compute.clock import StageReport
from common.compute.devices import Devices
from common.compute.options import RunOptions
from common.compute.tpu_estimate import estimate, memory_of, parse, shapes_in
from common.files.contracts import empty_embeddings
from common.files.stage_table import DENOISE
from common.runs import topology
from common.runs.flags import Given
from common.runs.jobs import denoising_job, make_sampler
from common.sampling.loading import UNetToLoad, load_jax_denoiser
from common.sampling.scheduler_tables import make_tables
from common.sampling.share import Share
from tests.conftest import PROJECT_DIR, Run

pytestmark = [
    pytest.mark.tpu_compiler,
    pytest.mark.skipif(find_spec("libtpu") is None, reason="needs libtpu: tools/set_up.sh tpu"),
]


@pytest.fixture(scope="module")
def reduced_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SDXL's configs with its own kinds of blocks, fewer channels and fewer of them."""
    folder = tmp_path_factory.mktemp("reduced")
    source = PROJECT_DIR / "models" / "sdxl_base"
    for path in source.rglob("*.json"):
        target = folder / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(path.read_text())
    config = json.loads((folder / "unet" / "config.json").read_text())
    config |= {
        "block_out_channels": [64, 128, 256],
        "attention_head_dim": [1, 2, 4],
        "transformer_layers_per_block": [1, 1, 2],
        "cross_attention_dim": 256,
        "addition_time_embed_dim": 32,
        "projection_class_embeddings_input_dim": 128 + 6 * 32,
        "layers_per_block": 1,
    }
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    return folder


def compile_unet(stage: Run, folder: Path, model: Path, *flags: object) -> tuple[Any, str]:
    """The estimate and the program's text."""
    result = stage(
        2,
        *("--model_id", model, "--topology", "v6e:2x4"),
        *("--json", folder / "estimate.json", "--save_hlo", folder / "program.txt"),
        *flags,
    )
    assert result.returncode == 0, result.stderr
    assert "an estimate without a TPU" in result.stdout
    content = json.loads((folder / "estimate.json").read_text())
    return content, (folder / "program.txt").read_text()


def test_one_image_over_eight_chips(stage: Run, reduced_sdxl: Path, tmp_path: Path) -> None:
    content, hlo = compile_unet(stage, tmp_path, reduced_sdxl)
    assert (content["chips"], content["mesh"]) == (8, "cfg=2,rows=4")
    assert content["fits"] and 0 < content["memory_bytes"]["total"] < 0.5e9
    step = content["step"]
    # What every self-attention is given; borders of convolutions; norms' statistics.
    config = json.loads((reduced_sdxl / "unet" / "config.json").read_text())
    blocks = count_transformer_blocks(config)
    assert step["collectives"]["all-gather"] == pytest.approx(blocks, abs=2)
    assert step["collectives"]["collective-permute"] > 10
    assert step["collectives"]["all-reduce"] > 10
    assert set(step["collectives"]) == {"all-gather", "all-reduce", "collective-permute"}
    assert step["kernel_cycles"] > 0
    assert step["total_seconds"] == pytest.approx(sum(step["seconds"].values()))
    # By its schedule: the same operations, collectives over the links that they really have.
    scheduled = step["scheduled"]
    for part in ("convolution", "linear", "norm"):
        assert scheduled["seconds"][part] == pytest.approx(step["seconds"][part])
    assert scheduled["seconds"]["attention"] > step["seconds"]["attention"]
    moved = scheduled["seconds"]["collectives"] + scheduled["hidden"]
    assert moved > step["seconds"]["collectives"] and scheduled["hidden"] >= 0
    # No scores: nothing with as many rows and columns as a picture has tokens is ever in memory.
    computations, _ = parse(hlo)
    largest = 1024 * 1024  # a kernel's block of queries and keys
    for instructions in computations.values():
        for instruction in instructions:
            for _, shape in shapes_in(instruction.result):
                if len(shape) >= 2 and min(shape[-2:]) >= 1024:
                    assert math.prod(shape[-2:]) <= largest, instruction.line[:300]


def count_transformer_blocks(config: dict[str, Any]) -> int:
    """The transformer blocks of a UNet, by its config."""
    layers, depth = config["layers_per_block"], config["transformer_layers_per_block"]
    down = sum(
        layers * d
        for kind, d in zip(config["down_block_types"], depth, strict=True)
        if "CrossAttn" in kind
    )
    up = sum(
        (layers + 1) * d
        for kind, d in zip(config["up_block_types"], reversed(depth), strict=True)
        if "CrossAttn" in kind
    )
    return down + up + depth[-1]


def test_eight_images_need_no_collective(stage: Run, reduced_sdxl: Path, tmp_path: Path) -> None:
    content, _ = compile_unet(
        stage, tmp_path, reduced_sdxl, "--num_images_per_prompt", 8, "--num_inference_steps", 4
    )
    assert (content["mesh"], content["images"], content["steps"]) == ("data=8", 8, 4)
    assert content["step"]["collectives"] == {}
    once, step = (content[part]["scheduled"]["total_seconds"] for part in ("once", "step"))
    seconds = once + 4 * step
    assert content["images_per_second"] == pytest.approx(8 / seconds)


def test_weights_that_do_not_fit_are_gathered_in_every_step(reduced_sdxl: Path) -> None:
    """Not before the loop, where they would be whole for all of it."""
    tpu_compiler.prepare_environment()
    config, checkpoint = topology.read_settings(Given(DENOISE, {"model_id": str(reduced_sdxl)}))
    devices = Devices.described(tpu_compiler.devices_of("v6e:2x4"), memory_bytes=1_000_000)
    sampler = make_sampler(config, checkpoint)
    embeddings = empty_embeddings(1, checkpoint.config("unet"))
    job = denoising_job(config, checkpoint, embeddings, sampler)
    unet = UNetToLoad(checkpoint=checkpoint, loras=(), dtype="bfloat16")
    denoiser = load_jax_denoiser(unet, [job], RunOptions(), StageReport(2), devices, {})
    denoiser.start(Share(job, np.arange(1), make_tables(sampler)))
    compiled = denoiser.lower(denoiser.plan.fullest()).compile()
    once, step = estimate(compiled.as_text(), CHIPS["v6e"])
    whole = sum(2 * math.prod(array.shape) for array in denoiser.parameters.values())
    assert step.collective_bytes["all-gather"] > 0.5 * whole
    assert once.collective_bytes.get("all-gather", 0) < 0.5 * whole  # projections of the prompts
    memory = memory_of(compiled)
    assert memory["arguments"] < 0.5 * whole  # a quarter, and the history of the steps
    assert memory["temporaries"] < 0.5 * whole


def test_the_decoder_compiles(stage: Run, tmp_path: Path) -> None:
    model = PROJECT_DIR / "models" / "demo"
    result = stage(
        3, "--model_id", model, "--topology", "v5e:2x2", "--json", tmp_path / "estimate.json"
    )
    assert result.returncode == 0, result.stderr
    content = json.loads((tmp_path / "estimate.json").read_text())
    assert (content["chips"], content["mesh"], content["steps"]) == (4, "rows=4", 0)
    assert content["chip_memory_bytes"] == CHIPS["v5e"].memory_bytes
    assert content["once"]["cycles"] > 0


def test_a_row_of_the_table_is_compiled_once(tmp_path: Path) -> None:
    row = "VAE 1024², v6e-1"
    command = [sys.executable, PROJECT_DIR / "benchmarks" / "tpu_estimates.py", "--row", row]
    command += ["--model_id", "models/demo", "--folder", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    line = result.stdout.splitlines()[-1]
    assert line.startswith(f"| {row} | `single` | ") and line.count("|") == 9
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.stdout.splitlines()[-1] == line and "estimate without a TPU" not in again.stdout


def test_an_impossible_grid_is_one_sentence(stage: Run) -> None:
    result = stage(2, "--topology", "v6e:3x5", "--model_id", PROJECT_DIR / "models" / "demo")
    assert result.returncode == 2
    assert "error: --topology v6e:3x5: the TPU compiler refuses it" in result.stderr
