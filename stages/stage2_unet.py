"""Stage 2: denoise, by diffusers' UNet compiled for TPU, GPU or CPU.

    python stages/stage2_unet.py
    python stages/stage2_unet.py --num_inference_steps 30 --mesh data=4

Reads   generation_config.json, stage1_embeddings.safetensors, the checkpoint's UNet and scheduler
        settings (no text encoder).
Writes  stage2_latents.safetensors   latents [B, C, h, w] float32, as the sampler leaves them
        stage2_report.json
Takes   some seconds for the demo checkpoint on a CPU once compiled.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import typer

from common import artifacts, command_line
from common.artifacts import Artifact, Header, Recipe
from common.checkpoint import Checkpoint, open_checkpoint
from common.command_line import say, warn
from common.components import load_scheduler, load_unet, quiet_libraries
from common.config import (
    DEFAULT_OUTPUT_DIR,
    GENERATION_CONFIG_FILE,
    GenerationConfig,
    RunOptions,
    check_size,
    read_generation_config,
    read_run_options,
    write_generation_config,
)
from common.contracts import embeddings_misfit
from common.errors import BadInputFileError
from common.images import group_size, groups, prompt_indices
from common.report import StageReport
from common.sharding import parse_mesh

if TYPE_CHECKING:
    import torch

COMPONENTS = ("unet", "scheduler")


def make_recipe(
    config: GenerationConfig, checkpoint: Checkpoint, embeddings: Artifact, unet_dtype: str
) -> Recipe:
    """All that determines the latents."""
    if embeddings.header is not None:
        prompt_settings = embeddings.header.recipe.settings
    else:
        prompt_settings = {
            "prompts": [prompt.prompt for prompt in config.prompts],
            "negative_prompts": [prompt.negative_prompt for prompt in config.prompts],
        }
    return Recipe(
        stage=2,
        settings={
            **prompt_settings,
            "height": config.height,
            "width": config.width,
            "num_inference_steps": config.num_inference_steps,
            "guidance_scale": config.guidance_scale,
            "num_images_per_prompt": config.num_images_per_prompt,
            "seeds": config.image_seeds(),
            "scheduler": config.scheduler_class(checkpoint.config("scheduler")["_class_name"]),
            "unet_dtype": unet_dtype,
        },
        inputs={artifacts.EMBEDDINGS_FILE: embeddings.data_sha256},
        weights={name: checkpoint.weights_fingerprint(name) for name in COMPONENTS},
        versions=artifacts.package_versions("torch", "torchax", "jax", "jaxlib", "diffusers"),
    )


def expected_dtype(asked: str, latents_file: Path) -> str:
    """The dtype to expect of fresh latents: `auto` stands for what it gave when they were made."""
    if asked == "auto" and latents_file.exists():
        try:
            header = artifacts.inspect(latents_file).header
        except BadInputFileError:
            return asked
        if header is not None and header.provenance.get("unet_dtype_asked") == "auto":
            return str(header.recipe.settings["unet_dtype"])
    return asked


def prompts_misfit(header: Header | None, config: GenerationConfig) -> str | None:
    """Say where the embeddings were made from other prompts than the run's settings name."""
    if header is None:
        return None
    made = header.recipe.settings
    for name, wanted in (
        ("prompts", [prompt.prompt for prompt in config.prompts]),
        ("negative_prompts", [prompt.negative_prompt for prompt in config.prompts]),
        ("text_encoder_dtype", config.text_encoder_dtype),
    ):
        if made.get(name) != wanted:
            return (
                f"was made with other {name} ({str(made.get(name))[:60]}) than "
                f"{GENERATION_CONFIG_FILE} names ({str(wanted)[:60]})"
            )
    return None


def time_ids(config: GenerationConfig) -> list[int]:
    """SDXL's size conditions: original size, the crop's corner, target size."""
    return [config.height, config.width, 0, 0, config.height, config.width]


def denoise_images(
    config: GenerationConfig,
    checkpoint: Checkpoint,
    embeddings: "dict[str, torch.Tensor]",
    unet_dtype: str,
    options: RunOptions,
    report: StageReport,
) -> "torch.Tensor":
    """Denoise all images, in groups of one shape. Returns latents [B, C, h, w] float32."""
    import numpy as np
    import torch
    from tqdm import tqdm

    from common import sharding
    from common.denoising import Denoiser, prepare_noise
    from common.scheduler_tables import make_tables

    # The scheduler as data, probed on the CPU
    with report.part("scheduler tables"):
        class_name = config.scheduler_class(checkpoint.config("scheduler")["_class_name"])
        tables = make_tables(load_scheduler(checkpoint, class_name), config.num_inference_steps)

    # The UNet: a PyTorch module for its code, its weights on the devices
    mesh = sharding.make_mesh(sharding.parse_mesh(options.mesh))
    with report.part("checkpoint read"):
        unet = load_unet(checkpoint, getattr(torch, unet_dtype))
    denoiser = Denoiser(unet, mesh, config.guidance_scale, options.steps_per_call, report)

    seeds = config.image_seeds()
    prompt_of = prompt_indices(len(config.prompts), config.num_images_per_prompt)
    factor, unet_config = checkpoint.vae_scale_factor, checkpoint.config("unet")
    shape = (unet_config["in_channels"], config.height // factor, config.width // factor)
    has_size_conditions = unet_config.get("addition_embed_type") == "text_time"

    latents = np.empty((len(seeds), *shape), np.float32)
    size = group_size(len(seeds), options.batch_size, mesh.shape["data"])
    steps = -(-len(seeds) // size) * tables.evaluations
    with tqdm(total=steps, desc="denoise", unit="step", disable=None) as progress:
        for chosen, real in groups(len(seeds), size):
            noise = prepare_noise([seeds[index] for index in chosen], tables, shape)
            denoiser.start(
                {key: tensor[prompt_of[chosen]] for key, tensor in embeddings.items()},
                noise,
                tables,
                time_ids(config) if has_size_conditions else None,
            )
            denoiser.compile()
            denoiser.warm_up(options.warmup_steps, noise)
            progress.unpause()
            for steps_done in denoiser.run():
                progress.update(steps_done)
            latents[chosen[:real]] = denoiser.latents()[:real]
    return torch.from_numpy(latents)


def main(
    context: typer.Context,
    num_images_per_prompt: command_line.NumImagesPerPrompt = None,
    height: command_line.Height = None,
    width: command_line.Width = None,
    num_inference_steps: command_line.NumInferenceSteps = None,
    guidance_scale: command_line.GuidanceScale = None,
    seed: command_line.Seed = None,
    scheduler: command_line.Scheduler = None,
    model_id: command_line.ModelId = None,
    dtype: command_line.StageDtype = None,
    unet_dtype: command_line.UnetDtype = None,
    input_dir: command_line.InputDir = None,
    output_dir: command_line.OutputDir = None,
    mesh: command_line.Mesh = None,
    batch_size: command_line.BatchSize = None,
    steps_per_call: command_line.StepsPerCall = None,
    warmup_steps: command_line.WarmupSteps = None,
    skip_fresh: command_line.SkipFresh = False,
    debug: command_line.Debug = False,
) -> None:
    """Denoise latents with the checkpoint's UNet, as one compiled program.

    Defaults stand in brackets; hyphens in flags work as well.
    """
    report = StageReport(2)
    run_dir = output_dir or input_dir or DEFAULT_OUTPUT_DIR
    source_dir = input_dir or run_dir
    path = run_dir / artifacts.LATENTS_FILE

    # 1. Settings: the run's, and what the flags override for this run of this stage
    config = read_generation_config(source_dir)
    config, overrides = command_line.apply_overrides(config, context.params, "unet_dtype")
    checkpoint = open_checkpoint(config.model_id, COMPONENTS)
    check_size(config, checkpoint.vae_scale_factor)
    options = read_run_options(context.params)
    parse_mesh(options.mesh)

    # 2. The input, whole and fitting; and are the latents fresh already?
    embeddings = artifacts.inspect(source_dir / artifacts.EMBEDDINGS_FILE)
    misfit = embeddings_misfit(embeddings.tensors, len(config.prompts), checkpoint.config("unet"))
    artifacts.refuse_misfit(embeddings, prompts_misfit(embeddings.header, config) or misfit)
    recipe = make_recipe(config, checkpoint, embeddings, expected_dtype(config.unet_dtype, path))
    stale = artifacts.why_stale(path, recipe)
    if skip_fresh and stale is None:
        say(f"stage 2: fresh ({path})")
        return
    say(f"stage 2: denoise {len(config.image_seeds())} image(s), {config.width}×{config.height}")
    command_line.say_why(stale if skip_fresh else None, overrides)

    # 3. Start jax
    with report.part("imports"):
        if not debug:
            quiet_libraries()
        from common import jax_setup, torchax_runtime  # noqa: F401

        counter = jax_setup.set_up_jax()
    dtype_used = jax_setup.choose_dtype(config.unet_dtype)

    # 4. Denoise
    tensors = artifacts.load_tensors(embeddings, warn)
    latents = denoise_images(config, checkpoint, tensors, dtype_used, options, report)

    # 5. Write
    recipe = make_recipe(config, checkpoint, embeddings, dtype_used)
    with report.part("writing"):
        provenance = {
            "model_id": config.model_id,
            "platform": jax_setup.platform(),
            "mesh": options.mesh,
            "unet_dtype_asked": config.unet_dtype,
            "overrides": overrides,
        }
        artifacts.save_tensors(path, {"latents": latents}, recipe, provenance)
        if run_dir.resolve() != source_dir.resolve():
            write_generation_config(run_dir, config)
    report.facts |= {
        "shapes": {"latents": list(latents.shape)},
        "dtype": dtype_used,
        "mesh": options.mesh,
        "platform": jax_setup.platform(),
        "programs_from_cache": counter.cache_hits,
        "versions": recipe.versions,
    }
    report.write(run_dir)
    command_line.say_times(report, path)


if __name__ == "__main__":
    command_line.run_command(command_line.make_command(main))
