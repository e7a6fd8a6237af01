"""SDXL's size conditions: what its UNet is told of the picture's size and crop."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import Field, ValidationInfo, field_validator

from common.conditions.base import CONDITIONAL, Condition, ImagesOfGroup
from common.declared import IMAGE_LATENTS, LATENTS, SAMPLING, SIZES, Settings, setting
from common.errors import BadSettingError
from common.models.component_table import AESTHETICS

if TYPE_CHECKING:
    import torch

MOST_PIXELS = 16_384  # a side
Pixels = Annotated[int, Field(ge=-1_000_000, le=1_000_000)]


def _size(text: str, metavar: str, default: Any = None) -> Any:
    """Declare a size condition; recipes hold what the UNet is told in the end (`time_ids`)."""
    return setting(
        default,
        text,
        metavar=metavar,
        group=SIZES,
        shapes=(LATENTS,),
        of_prompts=True,
        recorded=False,
        kind=str,
        shown="",
    )


def _score(default: float, text: str) -> Any:
    """Declare an aesthetic score; recipes hold what the UNet is told in the end (`time_ids`)."""
    return setting(
        default,
        text,
        metavar="X",
        group=SIZES,
        shapes=(LATENTS,),
        of_prompts=True,
        recorded=False,
        ge=0,
        le=10,
    )


class SizeSettings(Settings):
    """(height, width) and (top, left) in pixels; None: diffusers' defaults."""

    original_size: tuple[Pixels, Pixels] | None = _size("Of the picture before its crop.", "H,W")
    target_size: tuple[Pixels, Pixels] | None = _size("Of the picture wanted.", "H,W")
    crops_coords_top_left: tuple[Pixels, Pixels] = _size("The crop's corner.", "Y,X", (0, 0))
    negative_original_size: tuple[Pixels, Pixels] | None = _size(
        "For the unconditional half.", "H,W"
    )
    negative_target_size: tuple[Pixels, Pixels] | None = _size(
        "Likewise; needs the one before.", "H,W"
    )
    negative_crops_coords_top_left: tuple[Pixels, Pixels] = _size(
        "Likewise; needs both.", "Y,X", (0, 0)
    )

    aesthetic_score: float = _score(6.0, "Told refiners.")
    negative_aesthetic_score: float = _score(2.5, "Likewise.")

    @field_validator("*", mode="before")
    @classmethod
    def _list_in_a_flag(cls, value: Any, info: ValidationInfo) -> Any:
        if info.field_name not in SizeSettings.model_fields or "score" in info.field_name:
            return value
        numbers = value.split(",") if isinstance(value, str) else value
        if isinstance(numbers, list | tuple) and len(numbers) != 2:
            raise ValueError("give two numbers of pixels, as 1024,1024")
        return numbers


class AskedSize(Settings):
    """The pictures' size as it is asked for; None: that of `--image`, or the checkpoint's own."""

    height: int | None = setting(
        None,
        "Height.",
        metavar="PIXELS",
        group=SAMPLING,
        shapes=(IMAGE_LATENTS, LATENTS),
        of_prompts=True,
        shown="the checkpoint's own",
        ge=8,
        le=MOST_PIXELS,
    )
    width: int | None = setting(
        None,
        "Width.",
        metavar="PIXELS",
        group=SAMPLING,
        shapes=(IMAGE_LATENTS, LATENTS),
        of_prompts=True,
        shown="the checkpoint's own",
        ge=8,
        le=MOST_PIXELS,
    )


class ResolvedSize(SizeSettings):
    """The pictures' size, resolved, and what SDXL's UNet is told of it."""

    height: int = Field(ge=8, le=MOST_PIXELS)
    width: int = Field(ge=8, le=MOST_PIXELS)


class SizeCondition(Condition):
    """SDXL's pooled embeddings and size conditions."""

    settings = SizeSettings

    def __init__(self, time_ids: Mapping[str, list[float]]) -> None:
        self.time_ids = time_ids

    @classmethod
    def of(cls, config: Any, unet_config: Mapping[str, Any]) -> Self | None:
        return cls(time_ids(config, unet_config)) if takes_sizes(unet_config) else None

    def prepare(self, images: ImagesOfGroup, prediction: str) -> "dict[str, torch.Tensor]":
        """text_embeds [B, E]; time_ids [B, 6 or 5], float32 because bfloat16 rounds them."""
        import torch

        sign = "" if prediction == CONDITIONAL else "negative_"
        ids = [float(number) for number in self.time_ids[f"{sign}time_ids"]]
        return {
            "text_embeds": images.of_prediction("pooled_prompt_embeds", prediction),
            "time_ids": torch.tensor([ids]).repeat(images.count, 1),
        }

    def tell(self, tensors: Mapping[str, Any], call: dict[str, Any]) -> None:
        call["added_cond_kwargs"] = {key: tensors[key] for key in ("text_embeds", "time_ids")}


def time_ids(config: ResolvedSize, unet_config: Mapping[str, Any]) -> dict[str, list[float]]:
    """SDXL's size conditions: original size, the crop's corner, target size.

    As in diffusers' pipeline, the unconditional half has its own only where both of its sizes are
    given. SDXL's refiner is told an aesthetic score in the target size's place.
    """
    size = (config.height, config.width)
    if is_told_scores(unet_config):
        original = config.original_size or size
        negative_original = config.negative_original_size or original
        return {
            "time_ids": [*original, *config.crops_coords_top_left, config.aesthetic_score],
            "negative_time_ids": [
                *negative_original,
                *config.negative_crops_coords_top_left,
                config.negative_aesthetic_score,
            ],
        }
    positive: list[float] = [
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


def has_own_negative(config: SizeSettings) -> bool:
    """Whether the unconditional half has size conditions of its own, as in diffusers' pipeline."""
    return config.negative_original_size is not None and config.negative_target_size is not None


def takes_sizes(unet_config: Mapping[str, Any]) -> bool:
    """Whether a UNet is told sizes, as SDXL's is."""
    return unet_config.get("addition_embed_type") == "text_time"


def is_told_scores(unet_config: Mapping[str, Any]) -> bool:
    """Whether a UNet is told aesthetic scores, as SDXL's refiner is."""
    return bool(unet_config.get(AESTHETICS))


def recorded_sizes(
    config: ResolvedSize, unet_config: Mapping[str, Any], model_id: str
) -> dict[str, Any]:
    """The size conditions as recipes hold them, where the UNet takes them.

    Raises:
        BadSettingError: they are given for a UNet that takes none.
    """
    if takes_sizes(unet_config):
        return dict(time_ids(config, unet_config))
    for name, field in SizeSettings.model_fields.items():
        if getattr(config, name) != field.default:
            raise BadSettingError(
                f"--{name} is for SDXL checkpoints; the UNet of {model_id} takes no sizes"
            )
    return {}
