"""All kinds of conditions, in the order in which the UNet's call is put together."""

from collections.abc import Mapping
from typing import Any

from common.conditions.base import Condition
from common.conditions.edited_picture import EditedPicture
from common.conditions.guidance_scale import GuidanceScale
from common.conditions.masked_picture import MaskedPicture
from common.conditions.prompt_condition import PromptCondition
from common.conditions.sizes import SizeCondition

CONDITIONS: list[type[Condition]] = [
    PromptCondition,
    SizeCondition,
    GuidanceScale,
    MaskedPicture,
    EditedPicture,
]


def conditions_of(config: Any, unet_config: Mapping[str, Any]) -> tuple[Condition, ...]:
    """The conditions of a run, by its settings and its UNet's config."""
    found = (kind.of(config, unet_config) for kind in CONDITIONS)
    return tuple(condition for condition in found if condition is not None)
