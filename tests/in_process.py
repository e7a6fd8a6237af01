"""The stages' own functions called in one process, beside diffusers' pipeline as the reference."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline

from common.checkpoint import open_checkpoint
from common.components import load_scheduler, load_text_pipeline
from common.config import SCHEDULERS, GenerationConfig, RunOptions
from common.report import StageReport
from stages import stage1_text_encoder, stage2_unet, stage3_vae_decoder

PROMPTS = ("a large red star on a blue background", "a small green ring", "black cross on white")


def make_config(model: Path, **settings: Any) -> GenerationConfig:
    """Settings with a few prompts; `negative_prompt` and `batch` are shorthands."""
    negative = settings.pop("negative_prompt", "blurry, low quality")
    batch = settings.pop("batch", 1)
    defaults = {
        "model_id": str(model),
        "prompts": [{"prompt": p, "negative_prompt": negative} for p in PROMPTS[:batch]],
        "height": 128,
        "width": 128,
        "num_inference_steps": 6,
    }
    return GenerationConfig.model_validate(defaults | settings)


def run_ours(config: GenerationConfig, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """All three stages in float32. Returns latents [B, C, h, w] and pictures [B, H, W, 3] uint8."""
    checkpoint = open_checkpoint(config.model_id, ())
    pipeline = load_text_pipeline(checkpoint, torch.float32)
    embeddings = stage1_text_encoder.encode_prompts(pipeline, config)
    run = RunOptions(**options)
    latents = stage2_unet.denoise_images(
        config, checkpoint, embeddings, "float32", run, StageReport(2)
    ).numpy()
    pictures = stage3_vae_decoder.decode_images(latents, checkpoint, "float32", run, StageReport(3))
    return latents, pictures


def run_diffusers(config: GenerationConfig) -> tuple[np.ndarray, np.ndarray]:
    """The same settings by diffusers' own pipeline."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(config.model_id)
    if config.scheduler is not None:
        checkpoint = open_checkpoint(config.model_id, ())
        pipeline.scheduler = load_scheduler(checkpoint, SCHEDULERS[config.scheduler])
    pipeline.set_progress_bar_config(disable=True)
    negatives = [prompt.negative_prompt for prompt in config.prompts]
    captured: dict[str, torch.Tensor] = {}

    def keep_latents(_: Any, __: int, ___: Any, values: dict[str, Any]) -> dict[str, Any]:
        captured["latents"] = values["latents"]
        return values

    images = pipeline(
        prompt=[prompt.prompt for prompt in config.prompts],
        negative_prompt=None if negatives[0] is None else negatives,
        height=config.height,
        width=config.width,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        generator=[torch.Generator().manual_seed(seed) for seed in config.image_seeds()],
        callback_on_step_end=keep_latents,
        output_type="pil",
    ).images
    return captured["latents"].numpy(), np.stack([np.asarray(image) for image in images])


def relative_difference(actual: np.ndarray, expected: np.ndarray) -> float:
    """The norm of the difference over the norm of what is expected."""
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def pixel_difference(actual: np.ndarray, expected: np.ndarray) -> int:
    """The largest difference of two 8-bit pictures."""
    return int(np.abs(actual.astype(int) - expected.astype(int)).max())
