"""SDXL's size conditions: what its UNet is told of the picture's size and crop."""

from typing import Any

from common.errors import BadSettingError
from common.models.checkpoint import Checkpoint
from common.runs.generation import SIZE_CONDITIONS, GenerationConfig


def time_ids(config: GenerationConfig) -> dict[str, list[int]]:
    """SDXL's size conditions: original size, the crop's corner, target size.

    As in diffusers' pipeline, the unconditional half has its own only where both of its sizes are
    given.
    """
    size = (config.height, config.width)
    positive = [
        *(config.original_size or size),
        *config.crops_coords_top_left,
        *(config.target_size or size),
    ]
    negative = positive
    if has_own_negative(config):
        negative = [
            *(config.negative_original_size or ()),
            *config.negative_crops_coords_top_left,
            *(config.negative_target_size or ()),
        ]
    return {"time_ids": positive, "negative_time_ids": negative}


def has_own_negative(config: GenerationConfig) -> bool:
    """Whether the unconditional half has size conditions of its own, as in diffusers' pipeline."""
    return config.negative_original_size is not None and config.negative_target_size is not None


def size_condition_settings(config: GenerationConfig, checkpoint: Checkpoint) -> dict[str, Any]:
    """The size conditions as settings, where the UNet takes them.

    Raises:
        BadSettingError: they are given for a UNet that takes none.
    """
    if checkpoint.config("unet").get("addition_embed_type") == "text_time":
        return dict(time_ids(config))
    plain = GenerationConfig.model_fields
    given = [name for name in SIZE_CONDITIONS if getattr(config, name) != plain[name].default]
    if given:
        raise BadSettingError(
            f"--{given[0]} is for SDXL checkpoints; the UNet of {config.model_id} takes no sizes"
        )
    return {}
