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
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import typer

from common import artifacts, command_line
from common.checkpoint import Checkpoint, open_checkpoint
from common.command_line import say, warn
from common.components import load_text_pipeline, quiet_libraries, text_components
from common.config import (
    DEFAULT_OUTPUT_DIR,
    GenerationConfig,
    read_run_settings,
    resolve,
    write_generation_config,
)
from common.report import StageReport

if TYPE_CHECKING:
    import torch

COMPONENTS = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")


def make_recipe(config: GenerationConfig, checkpoint: Checkpoint) -> artifacts.Recipe:
    """All that determines the embeddings."""
    return artifacts.Recipe(
        stage=1,
        settings={
            "prompts": [prompt.prompt for prompt in config.prompts],
            "negative_prompts": [prompt.negative_prompt for prompt in config.prompts],
            "text_encoder_dtype": config.text_encoder_dtype,
            "pipeline": checkpoint.pipeline_class,
            "force_zeros_for_empty_prompt": checkpoint.index().get("force_zeros_for_empty_prompt"),
        },
        inputs={},
        weights={
            name: checkpoint.weights_fingerprint(name) for name in text_components(checkpoint)
        },
        versions=artifacts.package_versions("torch", "transformers", "diffusers", "tokenizers"),
    )


def encode_prompts(pipeline: Any, config: GenerationConfig) -> "dict[str, torch.Tensor]":
    """Encode every prompt by diffusers' `encode_prompt`, one at a time.

    So a prompt's embeddings are the same bits in any company. Negative prompts that repeat are
    encoded once.

    Returns:
        prompt_embeds, negative_prompt_embeds [P, L, D], and for SDXL pooled_prompt_embeds,
        negative_pooled_prompt_embeds [P, E], all in the text encoders' dtype.
    """
    import torch
    from tqdm import tqdm

    is_sdxl = pipeline.__class__.__name__ == "StableDiffusionXLPipeline"
    names: tuple[str, ...] = ("prompt_embeds", "negative_prompt_embeds")
    if is_sdxl:
        names += ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    encoded: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    negatives: dict[str | None, dict[str, torch.Tensor]] = {}
    with torch.no_grad():
        for prompt in tqdm(config.prompts, desc="encode", unit="prompt", leave=False, disable=None):
            known = negatives.get(prompt.negative_prompt, {})
            embeds = pipeline.encode_prompt(
                prompt=prompt.prompt,
                device=torch.device("cpu"),
                num_images_per_prompt=1,
                do_classifier_free_guidance=True,
                negative_prompt=prompt.negative_prompt,
                **known,
            )
            for name, tensor in zip(names, embeds, strict=True):
                encoded[name].append(tensor)
            negatives[prompt.negative_prompt] = {
                name: encoded[name][-1] for name in names if name.startswith("negative")
            }
    return {name: torch.cat(tensors) for name, tensors in encoded.items()}


def warn_of_cut_prompts(pipeline: Any, config: GenerationConfig) -> None:
    """Say which words of a prompt are beyond the tokenizer's 77 tokens and so not seen."""
    tokenizer = pipeline.tokenizer
    room = tokenizer.model_max_length - 2  # between the start and the end token
    texts = {p.prompt: "prompt" for p in config.prompts}
    texts |= {p.negative_prompt: "negative prompt" for p in config.prompts if p.negative_prompt}
    for text, kind in texts.items():
        ids = tokenizer(text, truncation=False, verbose=False).input_ids[1:-1]
        if len(ids) > room:
            cut = tokenizer.decode(ids[room:])
            warn(
                f"the {kind} {text[:30]!r}… has {len(ids)} tokens, over the {room} that the text "
                f"encoder reads; cut off: {cut!r}"
            )


def main(
    context: typer.Context,
    prompt: command_line.Prompt = None,
    prompts_file: command_line.PromptsFile = None,
    negative_prompt: command_line.NegativePrompt = None,
    no_negative_prompt: command_line.NoNegativePrompt = False,
    num_images_per_prompt: command_line.NumImagesPerPrompt = None,
    height: command_line.Height = None,
    width: command_line.Width = None,
    num_inference_steps: command_line.NumInferenceSteps = None,
    guidance_scale: command_line.GuidanceScale = None,
    seed: command_line.Seed = None,
    scheduler: command_line.Scheduler = None,
    model_id: command_line.ModelId = None,
    dtype: command_line.StageDtype = None,
    text_encoder_dtype: command_line.TextEncoderDtype = None,
    unet_dtype: command_line.UnetDtype = None,
    vae_dtype: command_line.VaeDtype = None,
    config: command_line.ConfigFile = None,
    output_dir: command_line.OutputDir = None,
    image_format: command_line.ImageFormatFlag = None,
    skip_fresh: command_line.SkipFresh = False,
    debug: command_line.Debug = False,
) -> None:
    """Encode the prompts on the CPU and settle every setting of the run.

    Defaults stand in brackets; hyphens in flags work as well.
    """
    report = StageReport(1)
    run_dir = output_dir or DEFAULT_OUTPUT_DIR
    path = run_dir / artifacts.EMBEDDINGS_FILE

    # 1. Settings: defaults < config file < flags
    flags = command_line.given_settings(context.params, "text_encoder_dtype")
    settings = read_run_settings(config, flags)
    checkpoint = open_checkpoint(settings.model_id, COMPONENTS)
    resolved = resolve(
        settings,
        native_size=checkpoint.native_size,
        size_factor=checkpoint.vae_scale_factor,
    )
    recipe = make_recipe(resolved, checkpoint)

    # 2. Fresh already?
    stale = artifacts.why_stale(path, recipe)
    if skip_fresh and stale is None:
        write_generation_config(run_dir, resolved)
        say(f"stage 1: fresh ({path})")
        return
    say(f"stage 1: encode {len(resolved.prompts)} prompt(s) with {resolved.model_id}")
    command_line.say_why(stale if skip_fresh else None, [])

    # 3. Load the text encoders
    with report.part("imports"):
        if not debug:
            quiet_libraries()
        import torch
        import transformers  # noqa: F401
    with report.part("checkpoint read"):
        pipeline = load_text_pipeline(checkpoint, getattr(torch, resolved.text_encoder_dtype))

    # 4. Encode
    warn_of_cut_prompts(pipeline, resolved)
    with report.part("run"):
        tensors = encode_prompts(pipeline, resolved)

    # 5. Write
    with report.part("writing"):
        provenance = {"model_id": resolved.model_id, "device": "cpu"}
        artifacts.save_tensors(path, tensors, recipe, provenance)
        write_generation_config(run_dir, resolved)
    report.facts |= {
        "shapes": {name: list(tensor.shape) for name, tensor in tensors.items()},
        "dtype": resolved.text_encoder_dtype,
        "versions": recipe.versions,
    }
    report.write(run_dir)
    command_line.say_times(report, path)


if __name__ == "__main__":
    command_line.run_command(command_line.make_command(main))
