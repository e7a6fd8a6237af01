"""A real UNet that compiles in seconds, images to denoise with it, and diffusers' own denoising."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from common.compute.clock import StageReport
from common.compute.groups import group_size
from common.compute.kept import Kept
from common.compute.options import RunOptions
from common.conditions.prompt_condition import PromptCondition
from common.conditions.sizes import SizeCondition
from common.models.checkpoint import Checkpoint
from common.models.model_settings import LoraFile
from common.sampling.denoiser import Denoiser
from common.sampling.guidance import Guidance
from common.sampling.job import DenoisingJob
from common.sampling.loading import UNetToLoad, open_denoiser
from common.sampling.sampler import Sampler, make_scheduler
from common.sampling.scheduler_tables import make_tables
from common.sampling.schedulers import SCHEDULERS
from common.sampling.share import Share
from tests.tiny_checkpoints import SCHEDULER

SHAPE = (4, 8, 8)  # of one image's latents, [C, h, w]
TOKENS, EMBEDDED, POOLED, PER_SIZE = 5, 12, 6, 4
TIME_IDS = {"time_ids": [64, 64, 0, 0, 64, 64], "negative_time_ids": [32, 48, 8, 4, 64, 64]}
ROUNDING = 1e-5  # float32 sums in another order


def save_unet(folder: Path, *, seed: int = 0, **changes: Any) -> Checkpoint:
    """A checkpoint's UNet of SDXL's kind with random weights."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=SHAPE[1],
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=EMBEDDED,
        addition_embed_type="text_time",
        addition_time_embed_dim=PER_SIZE,
        projection_class_embeddings_input_dim=POOLED + 6 * PER_SIZE,
        **changes,
    )
    unet.save_pretrained(folder / "unet")
    return Checkpoint(str(folder), folder)


def save_lora(
    checkpoint: Checkpoint, file: Path, *, seed: int, targets: Sequence[str] = ("to_q", "to_v")
) -> LoraFile:
    """A LoRA of random layers for the UNet, saved by diffusers."""
    unet = load_by_diffusers(checkpoint)
    torch.manual_seed(seed)
    layers = LoraConfig(r=2, target_modules=[*targets], init_lora_weights=False)
    unet.add_adapter(layers)
    StableDiffusionXLPipeline.save_lora_weights(
        file.parent, unet_lora_layers=get_peft_model_state_dict(unet), weight_name=file.name
    )
    return LoraFile(file=str(file))


def to_load(checkpoint: Checkpoint, *loras: LoraFile, dtype: str = "float32") -> UNetToLoad:
    return UNetToLoad(checkpoint=checkpoint, loras=loras, dtype=dtype)


def make_job(
    *,
    prompts: int = 1,
    images_per_prompt: int = 2,
    scheduler: str = "euler",
    steps: int = 4,
    seed: int = 5,
    shape: tuple[int, int, int] = SHAPE,
    **guidance: float,
) -> DenoisingJob:
    """Images of random prompts; guidance 4 unless it is given."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "prompt_embeds": (prompts, TOKENS, EMBEDDED),
        "pooled_prompt_embeds": (prompts, POOLED),
    }
    row = SCHEDULERS[scheduler]
    settings = SCHEDULER | {"timestep_spacing": "leading"}
    return DenoisingJob(
        embeddings={
            f"{sign}{name}": torch.randn(*shape_of, generator=generator)
            for name, shape_of in shapes.items()
            for sign in ("", "negative_")
        },
        prompt_of=np.repeat(np.arange(prompts), images_per_prompt),
        seeds=[seed + index for index in range(prompts * images_per_prompt)],
        latent_shape=shape,
        sampler=Sampler(
            make_scheduler(settings, row.class_name, row.options), num_inference_steps=steps
        ),
        guidance=Guidance(**{"scale": 4.0, **guidance}),
        conditions=(PromptCondition(), SizeCondition(TIME_IDS)),
    )


def open_one(
    backend: str,
    checkpoint: Checkpoint,
    job: DenoisingJob,
    kept: Kept | None = None,
    **options: Any,
) -> Denoiser:
    """A denoiser on one device unless a mesh is given; without `kept` all is loaded for it."""
    given = options if backend == "torch" else {"mesh": "single"} | options
    report = StageReport(2)
    unet, run_options = to_load(checkpoint), RunOptions(**given)
    return open_denoiser(kept or Kept(), backend, unet, [job], run_options, report)


def start(denoiser: Denoiser, job: DenoisingJob) -> Denoiser:
    """Begin with all images of a job as one group."""
    size = group_size(len(job.seeds), denoiser.devices_of_images)
    assert size == len(job.seeds)
    denoiser.start(Share(job, np.arange(size), make_tables(job.sampler)))
    denoiser.compile()
    return denoiser


def run(denoiser: Denoiser, job: DenoisingJob, **how: Any) -> np.ndarray:
    """All steps of a job's images as one group. Returns latents [B, C, h, w]."""
    for _ in start(denoiser, job).run(**how):
        pass
    return denoiser.latents()


def load_by_diffusers(checkpoint: Checkpoint) -> Any:
    return UNet2DConditionModel.from_pretrained(checkpoint.folder / "unet")


def predict_by_diffusers(
    unet: Any, job: DenoisingJob, index: int, sign: str, sample: torch.Tensor, timestep: Any
) -> torch.Tensor:
    """One prediction of an image, [1, C, h, w]; `sign` "negative_" is the unconditional one."""
    prompt = job.prompt_of[index]
    added = {
        "text_embeds": job.embeddings[f"{sign}pooled_prompt_embeds"][[prompt]],
        "time_ids": torch.tensor([TIME_IDS[f"{sign}time_ids"]], dtype=torch.float32),
    }
    embeds = job.embeddings[f"{sign}prompt_embeds"][[prompt]]
    predicted: torch.Tensor = unet(
        sample, timestep, encoder_hidden_states=embeds, added_cond_kwargs=added
    ).sample
    return predicted


def denoise_by_diffusers(checkpoint: Checkpoint, job: DenoisingJob, index: int) -> np.ndarray:
    """One image by diffusers. Returns latents [C, h, w]."""
    *_, latents = steps_by_diffusers(checkpoint, job, index)
    return latents


@torch.no_grad()
def steps_by_diffusers(
    checkpoint: Checkpoint, job: DenoisingJob, index: int
) -> Iterator[np.ndarray]:
    """One image by diffusers' UNet and scheduler, one prediction at a time.

    Yields latents [C, h, w] after each model evaluation.
    """
    unet, scheduler, guidance = load_by_diffusers(checkpoint), job.sampler.scheduler, job.guidance
    generator = torch.Generator().manual_seed(job.seeds[index])
    (steps,) = job.sampler.spacing.values()
    scheduler.set_timesteps(steps)
    latents = torch.randn(1, *job.latent_shape, generator=generator) * scheduler.init_noise_sigma
    count = len(scheduler.timesteps)
    for i, t in enumerate(scheduler.timesteps):
        sample = scheduler.scale_model_input(latents, t)
        output = predict_by_diffusers(unet, job, index, "", sample, t)
        if guidance.scale > 1 and int(guidance.start * count) <= i < int(guidance.end * count):
            negative = predict_by_diffusers(unet, job, index, "negative_", sample, t)
            output = negative + guidance.scale * (output - negative)
        own = {"generator": generator} if job.sampler.takes_generator else {}
        latents = scheduler.step(output, t, latents, **own).prev_sample
        yield np.array(latents[0].numpy())


def relative_difference(actual: np.ndarray, expected: np.ndarray) -> float:
    """The norm of the difference over the norm of what is expected."""
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))
