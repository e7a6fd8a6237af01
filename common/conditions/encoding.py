"""What stage 1 checks before prompts are encoded, and measures when they are."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common.compute.clock import StageReport
from common.compute.options import RunOptions
from common.conditions.prompt_settings import ResolvedPrompts
from common.conditions.prompts import encode_prompts
from common.errors import BadSettingError
from common.files.report import Profile
from common.models.checkpoint import Checkpoint
from common.models.component_table import SDXL, text_encoders
from common.models.model_settings import LoraFile


def check_own_loras(
    config: ResolvedPrompts, loras: Sequence[tuple[LoraFile, ...]], options: RunOptions
) -> None:
    """Raise `BadSettingError` for what needs that all prompts have the same LoRAs.

    Args:
        loras: of each prompt.
    """
    if len({*loras}) == 1:
        return
    measured = next((name for name in ("profile", "repeat") if getattr(options, name)), None)
    if measured is not None:
        raise BadSettingError(
            f"--{measured} is for runs whose prompts have the same LoRAs: leave it out, or theirs"
        )
    if config.prompt_weighting == "compel" and config.long_prompts == "chunk":
        raise BadSettingError(
            "--prompt_weighting compel --long_prompts chunk is for runs whose prompts have the "
            "same LoRAs, since compel fills all of them up to one length: leave one out"
        )


def check_prompt_options(config: ResolvedPrompts, checkpoint: Checkpoint) -> None:
    """Raise `BadSettingError` where an option asks for what the text encoders do not have."""
    encoders = checkpoint.listed(text_encoders())
    is_sdxl = checkpoint.pipeline_class == SDXL
    for name in ("prompt_2", "negative_prompt_2"):
        if not is_sdxl and any(getattr(prompt, name) is not None for prompt in config.prompts):
            raise BadSettingError(
                f"--{name} is for checkpoints with two text encoders; {checkpoint.model_id} has one"
            )
    if config.clip_skip is not None and config.prompt_weighting == "compel":
        raise BadSettingError(
            "--clip_skip and --prompt_weighting compel do not go together: give one"
        )
    if config.prompt_weighting is not None and checkpoint.is_refiner:
        raise BadSettingError(
            f"--prompt_weighting {config.prompt_weighting} wants the first text encoder, which "
            f"{checkpoint.model_id} lacks as SDXL's refiner does: leave it out"
        )
    # diffusers reads SDXL's states from one layer earlier than the others'.
    layers = min(int(checkpoint.config(name)["num_hidden_layers"]) for name in encoders)
    most = layers - is_sdxl
    if config.clip_skip is not None and config.clip_skip > most:
        raise BadSettingError(
            f"--clip_skip {config.clip_skip} is more than the text encoders of "
            f"{checkpoint.model_id} have: at most {most}"
        )


def measure_encoding(
    open_pipeline: Callable[[], Any],
    config: ResolvedPrompts,
    options: RunOptions,
    report: StageReport,
    folder: Path,
) -> Profile | None:
    """Encode again, as often as `--repeat` and `--profile` ask for.

    Args:
        open_pipeline: called where anything is measured.
        folder: of the profile's trace.
    """
    if not (options.repeat or options.profile):
        return None
    pipeline = open_pipeline()
    for _ in range(options.repeat):
        with report.part("repeats"):
            began = time.perf_counter()
            encode_prompts(pipeline, config)
            report.repeats.append(time.perf_counter() - began)
    if not options.profile:
        return None
    from common.compute.torch_profiler import TorchProfiler

    encoders = {name: getattr(pipeline, name, None) for name in text_encoders()}
    modules = {name: encoder for name, encoder in encoders.items() if encoder is not None}
    profiler = TorchProfiler(folder / "encode.pt.trace.json.gz", None, report, modules)
    profiler.start()
    with profiler.step(0):
        encode_prompts(pipeline, config)
    profiler.stop()
    return profiler.result()
