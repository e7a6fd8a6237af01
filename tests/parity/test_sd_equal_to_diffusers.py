"""SD 1.x/2.x by the same code: a tiny checkpoint of real components with random weights."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from tests.conftest import Run
from tests.in_process import (
    Ours,
    load_pipeline,
    make_config,
    pixel_difference,
    relative_difference,
    run_pipeline,
)
from tests.tiny_checkpoints import save_sd

PROMPTS = ["a red star", "a blue ring on white"]


@pytest.fixture(scope="module")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sd(tmp_path_factory.mktemp("tiny") / "sd")


@pytest.mark.parametrize("negative", [pytest.param("blurry", marks=pytest.mark.slow), None])
def test_sd_equals_diffusers_through_the_files(
    tiny_sd: Path, tmp_path: Path, run_all: Run, negative: str | None
) -> None:
    run_dir = tmp_path / "run"
    given = ["--no_negative_prompt"] if negative is None else ["--negative_prompt", negative]
    result = run_all(
        *("--model_id", tiny_sd, "--output_dir", run_dir, "--num_inference_steps", 5),
        *(part for prompt in PROMPTS for part in ("--prompt", prompt)),
        *given,
    )
    assert result.returncode == 0, result.stderr
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    kept = {}
    images = pipeline(
        prompt=PROMPTS,
        negative_prompt=None if negative is None else [negative] * 2,
        num_inference_steps=5,
        generator=[torch.Generator().manual_seed(seed) for seed in (42, 43)],
        callback_on_step_end=lambda _, __, ___, values: kept.update(values) or values,
    ).images
    latents = load_file(run_dir / "stage2_latents.safetensors")["latents"].numpy()
    assert latents.shape == (2, 4, 8, 8)
    assert relative_difference(latents, kept["latents"].numpy()) < 1e-4
    for index, image in enumerate(images):
        ours = np.asarray(Image.open(run_dir / f"output_image_{index:04d}.png"))
        assert pixel_difference(ours, np.asarray(image)) <= 2
    report = json.loads((run_dir / "stage1_report.json").read_text())
    assert set(report["shapes"]) == {"prompt_embeds", "negative_prompt_embeds"}
    shutil.rmtree(run_dir)


def test_an_old_scheduler_config_is_read_as_diffusers_reads_it(
    tiny_sd: Path, tmp_path: Path
) -> None:
    """Early SD checkpoints name no steps_offset and no clip_sample; the pipeline mends them."""
    model = tmp_path / "old"
    shutil.copytree(tiny_sd, model)
    for path, name in (
        ("scheduler/scheduler_config.json", "_class_name"),
        ("model_index.json", ""),
    ):
        content = json.loads((model / path).read_text())
        if name:
            del content["steps_offset"], content["clip_sample"]
            content[name] = "DDIMScheduler"
        else:
            content["scheduler"] = ["diffusers", "DDIMScheduler"]
        (model / path).write_text(json.dumps(content))
    ours, pipeline = Ours(model), load_pipeline(model)
    settings = pipeline.scheduler.config
    assert (settings.steps_offset, settings.clip_sample) == (1, False), "mended by the pipeline"
    for scheduler in (None, "euler", "pndm"):
        config = make_config(model, height=64, width=64, num_inference_steps=4, scheduler=scheduler)
        expected, _ = run_pipeline(pipeline, config)
        assert relative_difference(ours.denoise(config), expected) < 1e-4
