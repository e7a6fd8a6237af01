"""The stages' own functions called in one process, beside diffusers' pipeline as the reference."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline

from common.conditions.prompts import encode_prompts
from common.files.report import StageReport
from common.models.checkpoint import open_checkpoint
from common.models.lora import fuse_into_text_encoders
from common.models.weights import load_embedding, load_text_pipeline
from common.runs.generation import SIZE_CONDITIONS, GenerationConfig, RunOptions
from stages import stage2_unet, stage3_vae_decoder

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


class Ours:
    """The three stages' functions with the models of one checkpoint loaded once."""

    def __init__(
        self,
        model: str | Path,
        *,
        backend: str = "jax",
        dtype: str = "float32",
        embeddings: Sequence[str] = (),
        loras: Sequence[str] = (),
        settings: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.backend, self.dtype = backend, dtype
        config = make_config(Path(model), embeddings=embeddings, loras=loras, **(settings or {}))
        self.config = config
        self.checkpoint = open_checkpoint(config, ("unet", "vae"))
        # A program for one device compiles fastest; tests/sharded has the meshes.
        self.options = RunOptions(**({"mesh": "single"} | options))
        self.text_pipeline = load_text_pipeline(self.checkpoint, torch.float32)
        fuse_into_text_encoders(self.text_pipeline, config.loras, self.checkpoint.config("unet"))
        for embedding in config.embeddings:
            load_embedding(self.text_pipeline, embedding)
        self.denoiser = stage2_unet.load_denoiser(
            backend, config, self.checkpoint, dtype, self.options, StageReport(2)
        )
        self.programs = self.denoiser.report.programs

    def denoise(self, config: GenerationConfig) -> np.ndarray:
        """Stages 1 and 2. Returns latents [B, C, h, w]."""
        embeddings = encode_prompts(self.text_pipeline, config)
        sampler = stage2_unet.make_sampler(config, self.checkpoint)
        return stage2_unet.denoise_images(
            config, self.checkpoint, embeddings, self.denoiser, sampler, self.options
        ).latents.numpy()

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Stage 3. Returns pictures [B, H, W, 3] uint8."""
        decoder = stage3_vae_decoder.load_decoder(
            self.backend,
            latents.shape,
            self.config,
            self.checkpoint,
            self.dtype,
            self.options,
            StageReport(3),
        )
        self.programs = decoder.report.programs
        return stage3_vae_decoder.decode_groups(decoder, latents, self.options)


def run_ours(config: GenerationConfig, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """All three stages in float32. Returns latents [B, C, h, w] and pictures [B, H, W, 3] uint8."""
    ours = Ours(config.model_id, **options)
    latents = ours.denoise(config)
    return latents, ours.decode(latents)


def run_diffusers(config: GenerationConfig) -> tuple[np.ndarray, np.ndarray]:
    """The same settings by diffusers' own pipeline."""
    return run_pipeline(load_pipeline(config.model_id), config)


def load_pipeline(model: str | Path) -> Any:
    """diffusers' own pipeline of a checkpoint, in float32."""
    pipeline = DiffusionPipeline.from_pretrained(str(model))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run_pipeline(pipeline: Any, config: GenerationConfig) -> tuple[np.ndarray, np.ndarray]:
    """Settings by a pipeline whose scheduler is the checkpoint's own. Returns as `run_ours`."""
    own, seeds = pipeline.scheduler, config.image_seeds()
    class_name, options = config.scheduler_choice(type(own).__name__)
    if class_name == "DPMSolverSDEScheduler":
        options["noise_sampler_seed"] = seeds
    negatives = [prompt.negative_prompt for prompt in config.prompts]
    names = ("num_inference_steps", "timesteps", "sigmas")
    steps = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    prompt_options: dict[str, Any] = {"clip_skip": config.clip_skip}
    if hasattr(pipeline, "text_encoder_2"):
        for name in ("prompt_2", "negative_prompt_2"):
            values = [getattr(prompt, name) for prompt in config.prompts]
            prompt_options[name] = None if values[0] is None else values
        prompt_options |= {name: getattr(config, name) for name in SIZE_CONDITIONS}
    captured: dict[str, torch.Tensor] = {}

    def keep_latents(_: Any, __: int, ___: Any, values: dict[str, Any]) -> dict[str, Any]:
        captured["latents"] = values["latents"]
        return values

    try:
        if config.scheduler is not None or options:
            pipeline.scheduler = getattr(diffusers, class_name).from_config(own.config, **options)
        images = pipeline(
            prompt=[prompt.prompt for prompt in config.prompts],
            negative_prompt=None if negatives[0] is None else negatives,
            height=config.height,
            width=config.width,
            **{name: v if isinstance(v, int) else list(v) for name, v in steps.items()},
            **prompt_options,
            guidance_scale=config.guidance_scale,
            guidance_rescale=config.guidance_rescale,
            eta=config.eta,
            num_images_per_prompt=config.num_images_per_prompt,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            callback_on_step_end=keep_latents,
            output_type="pil",
        ).images
    finally:
        pipeline.scheduler = own
    return captured["latents"].numpy(), np.stack([np.asarray(image) for image in images])


def relative_difference(actual: np.ndarray, expected: np.ndarray) -> float:
    """The norm of the difference over the norm of what is expected."""
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def pixel_difference(actual: np.ndarray, expected: np.ndarray) -> int:
    """The largest difference of two 8-bit pictures."""
    return int(np.abs(actual.astype(int) - expected.astype(int)).max())
