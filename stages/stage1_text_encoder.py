"""Stage 1: encode the prompts with the checkpoint's own CLIP text encoders, on the CPU.

    python stages/stage1_text_encoder.py --prompt "a large red star on a blue background"

Reads   the settings (defaults, `--config`, flags) and the checkpoint's tokenizers, text encoders.
Writes  generation_config.json          every setting of the run, resolved
        stage1_embeddings.safetensors   prompt_embeds and negative_prompt_embeds [P, L, D];
                                        with two encoders also the pooled ones [P, E]
        stage1_report.json
Takes   some seconds for the demo checkpoint, under a minute for SDXL; no jax, no accelerator.
"""

import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import typer

from common.compute.backends import TORCH_FACTS
from common.conditions.prompts import cut_prompts, encode_prompts
from common.errors import BadSettingError
from common.files import artifacts
from common.files.kept_progress import progress_of, remove_progress
from common.files.report import Profile, StageReport
from common.files.run_lock import RunLock
from common.models.checkpoint import Checkpoint, hash_large_file, open_checkpoint
from common.models.lora import fuse_into_text_encoders, lora_settings
from common.models.weights import (
    find_embedding,
    import_text_classes,
    load_embedding,
    load_text_pipeline,
    quiet_libraries,
    spare_imports,
    text_components,
)
from common.runs import flags
from common.runs.flags import say, warn
from common.runs.generation import (
    DEFAULT_OUTPUT_DIR,
    GenerationConfig,
    read_run_options,
    read_run_settings,
    resolve,
    write_generation_config,
)
from common.stopping import finishing_first

ENCODERS = ("text_encoder", "text_encoder_2")
COMPONENTS = ("tokenizer", "tokenizer_2", *ENCODERS)


def make_recipe(config: GenerationConfig, checkpoint: Checkpoint) -> artifacts.Recipe:
    """All that determines the embeddings."""
    loras = lora_settings(config.loras, ENCODERS)
    return artifacts.Recipe(
        stage=1,
        settings={
            **config.prompt_settings(),
            "text_encoder_loras": loras,
            "embeddings": [
                {"token": embedding.token, "sha256": hash_large_file(find_embedding(embedding))}
                for embedding in config.embeddings
            ],
            "pipeline": checkpoint.pipeline_class,
            "force_zeros_for_empty_prompt": checkpoint.index().get("force_zeros_for_empty_prompt"),
        },
        inputs={},
        weights={
            name: checkpoint.weights_fingerprint(name) for name in text_components(checkpoint)
        },
        versions=artifacts.package_versions(
            *("torch", "transformers", "diffusers", "tokenizers"),
            *(["peft"] if loras else []),
            *(["compel"] if config.prompt_weighting else []),
        ),
    )


def check_prompt_options(config: GenerationConfig, checkpoint: Checkpoint) -> None:
    """Raise `BadSettingError` where an option asks for what the text encoders do not have."""
    encoders = [name for name in text_components(checkpoint) if name in ENCODERS]
    for name in ("prompt_2", "negative_prompt_2"):
        if len(encoders) < 2 and any(
            getattr(prompt, name) is not None for prompt in config.prompts
        ):
            raise BadSettingError(
                f"--{name} is for checkpoints with two text encoders; {config.model_id} has one"
            )
    if config.clip_skip is not None and config.prompt_weighting is not None:
        raise BadSettingError("--clip_skip and --prompt_weighting do not go together: give one")
    # diffusers reads SDXL's states from one layer earlier than the others'.
    layers = min(int(checkpoint.config(name)["num_hidden_layers"]) for name in encoders)
    most = layers - (checkpoint.pipeline_class == "StableDiffusionXLPipeline")
    if config.clip_skip is not None and config.clip_skip > most:
        raise BadSettingError(
            f"--clip_skip {config.clip_skip} is more than the text encoders of {config.model_id} "
            f"have: at most {most}"
        )


def profile_encoding(
    pipeline: Any, config: GenerationConfig, folder: Path, report: StageReport
) -> Profile:
    """Encode once more under torch's profiler."""
    from common.compute.torch_profiler import TorchProfiler

    encoders = {name: getattr(pipeline, name, None) for name in ENCODERS}
    modules = {name: encoder for name, encoder in encoders.items() if encoder is not None}
    profiler = TorchProfiler(folder / "encode.pt.trace.json.gz", None, report, modules)
    profiler.start()
    with profiler.step(0):
        encode_prompts(pipeline, config)
    profiler.stop()
    return profiler.result()


def main(
    context: typer.Context,
    prompt: flags.Prompt = None,
    prompt_2: flags.Prompt2 = None,
    prompts_file: flags.PromptsFile = None,
    negative_prompt: flags.NegativePrompt = None,
    negative_prompt_2: flags.NegativePrompt2 = None,
    no_negative_prompt: flags.NoNegativePrompt = False,
    num_images_per_prompt: flags.NumImagesPerPrompt = None,
    clip_skip: flags.ClipSkip = None,
    long_prompts: flags.LongPrompts = None,
    prompt_weighting: flags.PromptWeighting = None,
    embedding: flags.Embedding = None,
    original_size: flags.OriginalSize = None,
    target_size: flags.TargetSize = None,
    crops_coords_top_left: flags.CropsCoords = None,
    negative_original_size: flags.NegativeOriginalSize = None,
    negative_target_size: flags.NegativeTargetSize = None,
    negative_crops_coords_top_left: flags.NegativeCropsCoords = None,
    height: flags.Height = None,
    width: flags.Width = None,
    num_inference_steps: flags.NumInferenceSteps = None,
    timesteps: flags.Timesteps = None,
    sigmas: flags.Sigmas = None,
    guidance_scale: flags.GuidanceScale = None,
    guidance_rescale: flags.GuidanceRescale = None,
    guidance_start: flags.GuidanceStart = None,
    guidance_end: flags.GuidanceEnd = None,
    seed: flags.Seed = None,
    scheduler: flags.Scheduler = None,
    scheduler_option: flags.SchedulerOption = None,
    eta: flags.Eta = None,
    model_id: flags.ModelId = None,
    revision: flags.Revision = None,
    variant: flags.Variant = None,
    single_file_config: flags.SingleFileConfig = None,
    unet: flags.Unet = None,
    vae: flags.Vae = None,
    lora: flags.Lora = None,
    dtype: flags.StageDtype = None,
    text_encoder_dtype: flags.TextEncoderDtype = None,
    unet_dtype: flags.UnetDtype = None,
    vae_dtype: flags.VaeDtype = None,
    tile: flags.Tile = None,
    config: flags.ConfigFile = None,
    output_dir: flags.OutputDir = None,
    image_format: flags.ImageFormatFlag = None,
    offline: flags.Offline = False,
    wait: flags.Wait = False,
    repeat: flags.Repeat = None,
    profile: flags.Profile = False,
    profile_dir: flags.ProfileDir = None,
    skip_fresh: flags.SkipFresh = False,
    debug: flags.Debug = False,
) -> None:
    """Encode the prompts on the CPU and settle every setting of the run.

    Defaults stand in brackets; hyphens in flags work as well.
    """
    report = StageReport(1)
    run_dir = output_dir or DEFAULT_OUTPUT_DIR
    path = run_dir / artifacts.EMBEDDINGS_FILE

    # 1. Settings: defaults < config file < flags
    report.phase("settings")
    given = flags.given_settings(context.params, "text_encoder_dtype")
    settings = read_run_settings(config, given)
    checkpoint = open_checkpoint(settings, COMPONENTS)
    resolved = resolve(
        settings,
        native_size=checkpoint.native_size,
        size_factor=checkpoint.vae_scale_factor,
    )
    check_prompt_options(resolved, checkpoint)
    options = read_run_options(context.params)
    recipe = make_recipe(resolved, checkpoint)

    # 2. Fresh already?
    lock = RunLock.of_stage(run_dir, wait=wait)
    context.call_on_close(lock.release)
    lock.acquire()
    stale = artifacts.why_stale(path, recipe)
    stale = stale or options.why_measure()
    if skip_fresh and stale is None:
        write_generation_config(run_dir, resolved)
        say(f"stage 1: fresh ({path})")
        return
    say(f"stage 1: encode {len(resolved.prompts)} prompt(s) with {resolved.model_id}")
    flags.say_why(stale if skip_fresh else None, [])

    # 3. Load the text encoders
    report.phase("imports")
    if not debug:
        quiet_libraries()
    if not resolved.loras:
        spare_imports("peft", "scipy")
    import torch

    import_text_classes(checkpoint)
    report.phase("other")
    with report.part("checkpoint_read"):
        pipeline = load_text_pipeline(checkpoint, getattr(torch, resolved.text_encoder_dtype))
        fuse_into_text_encoders(pipeline, resolved.loras, checkpoint.config("unet"))
        for item in resolved.embeddings:
            load_embedding(pipeline, item)

    # 4. Encode
    for line in cut_prompts(pipeline, resolved):
        warn(line)
    progress = progress_of(run_dir, recipe, options, TORCH_FACTS)
    keeps = len(resolved.prompts) > 1 and progress is not None
    with finishing_first() if keeps else nullcontext() as stop, report.part("run"):
        tensors = encode_prompts(pipeline, resolved, progress, stop)
    for _ in range(options.repeat):
        with report.part("repeats"):
            began = time.perf_counter()
            encode_prompts(pipeline, resolved)
            report.repeats.append(time.perf_counter() - began)
    profiled = None
    if options.profile:
        profiled = profile_encoding(pipeline, resolved, options.profile_folder(run_dir, 1), report)

    # 5. Write
    with report.part("writing"):
        provenance = {**resolved.model_settings(), "device": "cpu"}
        artifacts.save_tensors(path, tensors, recipe, provenance)
        write_generation_config(run_dir, resolved)
        remove_progress(run_dir, 1)
    report.write(
        run_dir,
        shapes={name: list(tensor.shape) for name, tensor in tensors.items()},
        dtype=resolved.text_encoder_dtype,
        dtype_asked=resolved.text_encoder_dtype,
        **TORCH_FACTS,
        versions=recipe.versions,
        profile=profiled,
    )
    flags.say_times(report, path, profiled)


if __name__ == "__main__":
    flags.run_command(flags.make_command(main))
