"""The three stages' computing in one process, beside diffusers' pipeline as the reference."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from common.compute.clock import StageReport
from common.compute.kept import Kept
from common.compute.options import RunOptions
from common.conditions.prompts import encode_prompts
from common.conditions.sizes import SizeSettings
from common.files.kept_progress import Progress
from common.files.made_rows import MadeRows
from common.models.find import open_checkpoint
from common.models.text_pipeline import open_text_pipeline
from common.runs.generation import GenerationConfig
from common.runs.image_latents import image_tensors, read_inputs
from common.runs.jobs import denoising_job, make_sampler
from common.sampling.denoising import Denoised, denoise_images
from common.sampling.job import DenoisingJob
from common.sampling.loading import UNetToLoad, open_denoiser
from common.sampling.schedulers import scheduler_choice
from common.stopping import StopRequest
from common.vae.decoding import decode_all
from common.vae.encoding import encode_groups, split_by_parts
from common.vae.loading import VaeToLoad, open_decoder, open_encoder
from tests.configs import make_config


class Ours:
    """What the three stages compute with one checkpoint, its models loaded once."""

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
        self.kept = Kept(most_models=3)
        self.report = StageReport(2)  # of all that is computed
        self.programs = self.report.programs
        self.text_pipeline = open_text_pipeline(
            self.kept, self.checkpoint, "float32", config.loras, config.embeddings
        )

    def job(self, config: GenerationConfig) -> DenoisingJob:
        """Stage 1, and what it leaves to stage 2."""
        embeddings = encode_prompts(self.text_pipeline, config)
        sampler = make_sampler(config, self.checkpoint)
        begin = None if config.init_latents is None else load_file(config.init_latents)
        begin = self.image_latents(config) if config.has_pictures else begin
        return denoising_job(config, self.checkpoint, embeddings, sampler, begin)

    def image_latents(self, config: GenerationConfig) -> dict[str, torch.Tensor]:
        """Stage 0: its tensors."""
        inputs, factor = read_inputs(config), self.checkpoint.vae_scale_factor
        laid = inputs.lay(config, factor)
        vae, parts = self.vae(), laid.to_encode()
        pictures = np.concatenate([*parts.values()])
        encoder = open_encoder(
            self.kept, self.backend, vae, pictures.shape, self.options, self.report
        )
        found = encode_groups(encoder, pictures, self.options)
        encoded = split_by_parts(found, {name: len(part) for name, part in parts.items()})
        return image_tensors(laid, inputs, encoded, factor)

    def vae(self) -> VaeToLoad:
        """The checkpoint's."""
        return VaeToLoad(checkpoint=self.checkpoint, dtype=self.dtype, tile=self.config.tile)

    def denoised(
        self,
        config: GenerationConfig,
        *,
        progress: Progress | None = None,
        stop: StopRequest | None = None,
        **changes: Any,
    ) -> Denoised:
        """Stages 1 and 2; `changes` are those of the options."""
        options, job = self.options.model_copy(update=changes), self.job(config)
        unet = UNetToLoad(checkpoint=self.checkpoint, loras=self.config.loras, dtype=self.dtype)
        self.denoiser: Any = open_denoiser(
            self.kept, self.backend, unet, [job], options, self.report
        )
        made = MadeRows.numbered(len(job.seeds), progress)
        return denoise_images(lambda _: self.denoiser, [job], options, made, stop=stop)

    def denoise(self, config: GenerationConfig) -> np.ndarray:
        """Stages 1 and 2. Returns latents [B, C, h, w]."""
        return self.denoised(config).latents.numpy()

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Stage 3. Returns pictures [B, H, W, 3] uint8."""
        decoder = open_decoder(
            self.kept, self.backend, self.vae(), [latents.shape], self.options, self.report
        )
        return decode_all(decoder, latents, self.options)


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


@contextmanager
def scheduled(pipeline: Any, config: GenerationConfig) -> Iterator[None]:
    """A pipeline with the scheduler that settings ask for, in place of the checkpoint's own."""
    own = pipeline.scheduler
    class_name, options = scheduler_choice(
        config.scheduler, config.scheduler_options, type(own).__name__
    )
    if class_name == "DPMSolverSDEScheduler":
        options["noise_sampler_seed"] = config.image_seeds()
    if config.scheduler is not None or options:
        pipeline.scheduler = getattr(diffusers, class_name).from_config(own.config, **options)
    try:
        yield
    finally:
        pipeline.scheduler = own


def generators_of(config: GenerationConfig) -> list[torch.Generator]:
    """Each image's own."""
    return [torch.Generator().manual_seed(seed) for seed in config.image_seeds()]


def run_pipeline(pipeline: Any, config: GenerationConfig) -> tuple[np.ndarray, np.ndarray]:
    """Settings by a pipeline whose scheduler is the checkpoint's own. Returns as `run_ours`."""
    negatives = [prompt.negative_prompt for prompt in config.prompts]
    names = ("num_inference_steps", "timesteps", "sigmas")
    steps = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    prompt_options: dict[str, Any] = {"clip_skip": config.clip_skip}
    if hasattr(pipeline, "text_encoder_2"):
        for name in ("prompt_2", "negative_prompt_2"):
            values = [getattr(prompt, name) for prompt in config.prompts]
            prompt_options[name] = None if values[0] is None else values
        taken = inspect.signature(pipeline.__call__).parameters  # a base is told no scores
        sizes = [name for name in SizeSettings.model_fields if name in taken]
        prompt_options |= {name: getattr(config, name) for name in sizes}
    captured: dict[str, torch.Tensor] = {}

    def keep_latents(_: Any, __: int, ___: Any, values: dict[str, Any]) -> dict[str, Any]:
        captured["latents"] = values["latents"]
        return values

    with scheduled(pipeline, config):
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
            generator=generators_of(config),
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
