"""What a run asks stage 2 to compute: its sampler, its images, what the UNet is told of them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from common.conditions.edited_picture import EditSettings
from common.conditions.guidance_scale import is_told_guidance
from common.conditions.sizes import SizeSettings, has_own_negative, is_told_scores
from common.conditions.table import conditions_of
from common.errors import BadSettingError
from common.messages import say, warn
from common.models.checkpoint import Checkpoint
from common.models.component_table import SD, SDXL
from common.runs.generation import GenerationConfig
from common.runs.image_latents import cells_of
from common.runs.parts import Part
from common.runs.recipes import scheduler_of
from common.sampling.sampler import Sampler, as_pipeline_reads_it, make_scheduler
from common.sampling.step_range import StepRange, first_timesteps, is_plms

if TYPE_CHECKING:
    import torch

    from common.sampling.beginning import Beginning
    from common.sampling.job import DenoisingJob, HasRows


def make_sampler(config: GenerationConfig, checkpoint: Checkpoint) -> Sampler:
    """The scheduler that the settings ask for, with the checkpoint's own settings.

    Raises:
        BadSettingError: diffusers refuses its settings or its steps.
    """
    class_name, options = scheduler_of(config, checkpoint)
    settings = checkpoint.config("scheduler")
    if checkpoint.pipeline_class == SD:
        settings = as_pipeline_reads_it(settings, class_name)
    scheduler = make_scheduler(settings, class_name, options)
    step_range = StepRange(
        strength=strength_of(config, checkpoint),
        denoising_start=config.denoising_start,
        denoising_end=config.denoising_end,
    )
    sampler = Sampler(
        scheduler,
        **config.steps(),
        eta=config.eta,
        step_range=step_range,
    )
    if config.eta > 0 and not sampler.takes_eta:
        warn(f"--eta {config.eta} has no effect: {class_name} takes none")
    sampler.restart()
    return sampler


def strength_of(config: GenerationConfig, checkpoint: Checkpoint) -> float | None:
    """How much noise is added to what a run begins with; by default as diffusers' pipelines."""
    begins = config.has_pictures or config.init_latents is not None
    begins = begins and not checkpoint.edits_pictures  # from noise, beside the picture
    if not begins or config.denoising_start is not None:
        return None
    if config.strength is not None:
        return config.strength
    is_sdxl = checkpoint.pipeline_class == SDXL
    if config.inpaints:
        return 0.9999 if is_sdxl else 1.0
    return 0.3 if is_sdxl else 0.8


def say_steps(samplers: Sequence[Sampler]) -> None:
    """Say how many of their steps a run's images take where these are not all."""
    lines = []
    for sampler in samplers:
        step_range = sampler.step_range
        if step_range == StepRange():
            continue
        timesteps = sampler.restart()
        steps = len(first_timesteps(sampler.scheduler))
        own = len(timesteps) if sampler.scheduler.order == 1 else -(-len(timesteps) // 2)
        own -= is_plms(sampler.scheduler) and own > 1
        said = f"{own} of {steps} steps, from timestep {float(timesteps[0]):g}"
        lines.append(f"  {said} ({step_range.in_words()})")
    for line in dict.fromkeys(lines):
        say(line)


def denoising_job(
    config: GenerationConfig,
    checkpoint: Checkpoint,
    embeddings: "Mapping[str, HasRows]",
    sampler: Sampler,
    begin: "dict[str, torch.Tensor] | None" = None,
) -> "DenoisingJob":
    """All images of a run.

    Args:
        embeddings: stage 1's tensors, a row for each prompt.
        begin: stage 0's tensors, or those of `--init_latents`.
    """
    import numpy as np

    from common.sampling.guidance import guidance_of
    from common.sampling.job import DenoisingJob

    unet_config = checkpoint.config("unet")
    prompt_of = np.array(config.prompt_of_images())
    return DenoisingJob(
        embeddings=embeddings,
        prompt_of=prompt_of,
        seeds=config.image_seeds(),
        latent_shape=latent_shape(config, checkpoint),
        sampler=sampler,
        guidance=guidance_of(config, unet_config, config.image_guidance_scale),
        conditions=conditions_of(config, unet_config),
        prompts=[prompt.prompt for prompt in config.prompts],
        begin=beginning_of(config, checkpoint, prompt_of.tolist(), begin),
        loras=config.loras,
    )


def denoising_jobs(
    config: GenerationConfig,
    checkpoint: Checkpoint,
    embeddings: "Mapping[str, HasRows]",
    parts: Sequence[tuple[Part, Sampler]],
    begin: "dict[str, torch.Tensor] | None" = None,
) -> "list[DenoisingJob]":
    """All images of a run, a job for those with the same settings; else as `denoising_job`."""
    whole = denoising_job(config, checkpoint, embeddings, parts[0][1], begin)
    if len(parts) == 1 and parts[0][0].config is config:
        return [whole]
    from common.sampling.guidance import guidance_of

    unet_config, jobs = checkpoint.config("unet"), []
    for part, sampler in parts:
        own = part.config
        scale = own.image_guidance_scale
        jobs.append(
            replace(
                whole,
                sampler=sampler,
                guidance=guidance_of(own, unet_config, scale),
                conditions=conditions_of(own, unet_config),
                latent_shape=latent_shape(own, checkpoint),
                loras=own.loras,
                chosen=part.images,
            )
        )
    # Those with the same LoRAs one after the other.
    order = [*dict.fromkeys(job.loras for job in jobs)]
    return sorted(jobs, key=lambda job: order.index(job.loras))


def beginning_of(
    config: GenerationConfig,
    checkpoint: Checkpoint,
    prompt_of: list[int],
    begin: "dict[str, torch.Tensor] | None",
) -> "Beginning":
    """What the images of a run begin with.

    Args:
        prompt_of: each image's prompt.
        begin: as `denoising_job`.
    """
    from common.sampling.beginning import (
        FromEditedPictures,
        FromLatents,
        FromMaskedPictures,
        FromNoise,
        FromPictures,
    )

    if begin is None:
        return FromNoise()
    if not config.has_pictures:
        latents = enlarged(begin["latents"].float(), cells_of(config, checkpoint))
        return FromLatents(latents.expand(len(prompt_of), -1, -1, -1))
    pictures = len(begin["image_latents_mean"])
    rows = prompt_of if pictures > 1 else [0] * len(prompt_of)
    vae = checkpoint.config("vae")
    if checkpoint.edits_pictures:
        scaled = checkpoint.index().get("is_cosxl_edit", False)
        scale = float(vae["scaling_factor"]) if scaled else 1.0
        return FromEditedPictures(begin["image_latents_mean"], rows, scale)
    if not config.inpaints:
        return FromPictures(begin, rows, vae)
    by_channels = checkpoint.inpaints_by_channels
    return FromMaskedPictures(begin, rows, vae, by_channels=by_channels, soft=config.soft_mask)


def empty_beginning(checkpoint: Checkpoint, images: int, cells: tuple[int, int]) -> "Beginning":
    """What images begin with of whose pictures nothing is there: zeros, for UNets that see them.

    Args:
        cells: rows and columns of the latents.
    """
    import torch

    from common.sampling.beginning import FromEditedPictures, FromMaskedPictures, FromNoise

    zeros, rows = torch.zeros(1, checkpoint.unet_channels[1], *cells), [0] * images
    if checkpoint.edits_pictures:
        return FromEditedPictures(zeros, rows, 1.0)
    if not checkpoint.inpaints_by_channels:
        return FromNoise()
    names = [f"{part}image_latents_{kind}" for part in ("", "masked_") for kind in ("mean", "std")]
    tensors = {**dict.fromkeys(names, zeros), "latent_masks": zeros[:, :1]}
    return FromMaskedPictures(tensors, rows, checkpoint.config("vae"), by_channels=True)


def enlarged(latents: "torch.Tensor", cells: tuple[int, int]) -> "torch.Tensor":
    """Latents [B, C, h, w] with so many rows and columns of cells, bilinear as in web UIs."""
    import torch

    if tuple(latents.shape[2:]) == cells:
        return latents
    return torch.nn.functional.interpolate(latents, size=cells, mode="bilinear")


def refuse_unfit_inputs(config: GenerationConfig, checkpoint: Checkpoint) -> None:
    """Raise `BadSettingError` where a UNet that is shown pictures is to do something else."""
    said = checkpoint.source("unet").said
    if checkpoint.edits_pictures:
        if not config.has_pictures:
            raise BadSettingError(
                f"{said}: its UNet edits pictures by instruction: give --image, or another "
                "checkpoint"
            )
        if config.inpaints or config.strength is not None:
            given = "strength" if config.strength is not None else "mask_image or --outpaint"
            raise BadSettingError(
                f"--{given} is not for edits by instruction, which begin with noise beside the "
                "whole picture: leave it out, or choose another checkpoint"
            )
    if checkpoint.inpaints_by_channels and not config.inpaints:
        raise BadSettingError(
            f"{said}: its UNet inpaints and is shown a mask: give "
            "--image and --mask_image, or another checkpoint"
        )
    if checkpoint.inpaints_by_channels and config.soft_mask:
        raise BadSettingError(
            f"{said}: its UNet is shown the mask and knows black and white alone: leave "
            "--soft_mask out, or choose another checkpoint"
        )


def latent_shape(config: GenerationConfig, checkpoint: Checkpoint) -> tuple[int, int, int]:
    """One image's latents, [C, h, w]."""
    return checkpoint.unet_channels[1], *cells_of(config, checkpoint)


def warn_of_settings(configs: Sequence[GenerationConfig], checkpoint: Checkpoint) -> None:
    """Say which settings of a run's images change nothing, as diffusers leaves without a word."""
    lines = [line for config in configs for line in _without_effect(config, checkpoint)]
    for line in dict.fromkeys(lines):
        warn(line)


def _without_effect(config: GenerationConfig, checkpoint: Checkpoint) -> Iterator[str]:
    for line in checkpoint.said_by_file():
        yield f"{checkpoint.source('unet').file} says {line}"
    is_sdxl = checkpoint.pipeline_class == SDXL
    if is_sdxl and checkpoint.inpaints_by_channels and strength_of(config, checkpoint) == 1.0:
        yield "--strength 1.0 gives noise with public SDXL UNets for inpainting: use 0.99"
    default_scores = all(
        getattr(config, name) == SizeSettings.model_fields[name].default
        for name in ("aesthetic_score", "negative_aesthetic_score")
    )
    if not default_scores and not is_told_scores(checkpoint.config("unet")):
        yield "--aesthetic_score has no effect: this UNet is told none, as SDXL's refiner is"
    default = EditSettings.model_fields["image_guidance_scale"].default
    if config.image_guidance_scale != default and not checkpoint.edits_pictures:
        yield "--image_guidance_scale has no effect: this UNet edits no pictures by instruction"
    partial = (config.negative_original_size is None) != (config.negative_target_size is None)
    if partial or (
        config.negative_crops_coords_top_left != (0, 0) and not has_own_negative(config)
    ):
        yield (
            "the negative size conditions have no effect: they need both --negative_original_size "
            "and --negative_target_size"
        )
    interval = (config.guidance_rescale, config.guidance_start, config.guidance_end)
    if is_told_guidance(checkpoint.config("unet")) and interval != (0, 0, 1):
        yield (
            "--guidance_rescale, --guidance_start and --guidance_end have no effect: this UNet is "
            "told the guidance scale and computes no unconditional half"
        )


def packages_to_spare(configs: Sequence[GenerationConfig], checkpoint: Checkpoint) -> list[str]:
    """What diffusers need not import to denoise with the settings of a run's images."""
    needs_scipy = False
    for config in configs:
        class_name, options = scheduler_of(config, checkpoint)
        settings: dict[str, Any] = {**checkpoint.config("scheduler"), **options}
        needs_scipy |= class_name == "LMSDiscreteScheduler" or bool(settings.get("use_beta_sigmas"))
    return ["peft", "transformers", *([] if needs_scipy else ["scipy"])]
