"""Pictures that a run begins with, and how they are laid into its size."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from common.declared import (
    IMAGE_LATENTS,
    INPUT,
    LATENTS,
    PICTURES,
    Place,
    Settings,
    setting,
)

ResizeMode = Literal["default", "fill", "crop"]
MOST_BORDER = 8_192  # pixels


class AskedInputs(Settings):
    """Pictures and masks as they are asked for; each prompt has its own once resolved."""

    image: tuple[Place, ...] | None = setting(
        None,
        "A picture to begin with, or a folder.",
        metavar="FILE",
        group=INPUT,
        shapes=(IMAGE_LATENTS,),
        recorded=False,
        many=True,
        shown="",
    )
    mask_image: tuple[Place, ...] | None = setting(
        None,
        "White is what is made anew.",
        metavar="FILE",
        group=INPUT,
        shapes=(IMAGE_LATENTS,),
        recorded=False,
        many=True,
        shown="",
    )


class InputSettings(Settings):
    """How pictures and masks are read."""

    resize_mode: ResizeMode = setting(
        "default",
        "default, fill, crop.",
        metavar="HOW",
        group=INPUT,
        shapes=(IMAGE_LATENTS,),
    )
    soft_mask: bool = setting(  # differential diffusion
        False,
        "Grey in it: made anew for some steps.",
        metavar=" ",
        group=INPUT,
        shapes=(IMAGE_LATENTS, LATENTS),
        shown="",
    )
    padding_mask_crop: int | None = setting(
        None,
        "Work on the mask and so much around.",
        metavar="PIXELS",
        group=INPUT,
        shapes=(IMAGE_LATENTS, PICTURES),
        shown="",
        ge=0,
        le=MOST_BORDER,
    )
    outpaint: tuple[Annotated[int, Field(ge=0, le=MOST_BORDER)], ...] | None = setting(
        None,
        "Pixels to add around it.",
        metavar="L,T,R,B",
        group=INPUT,
        shapes=(IMAGE_LATENTS,),
        kind=str,
        shown="",
    )
    keep_unmasked: bool = setting(
        False,
        "Paste the rest of the picture back.",
        metavar=" ",
        group=INPUT,
        shapes=(PICTURES,),
        shown="",
    )
    # Recipes hold the pixels that it gives.
    image_background: str = setting(
        "#ffffff",
        "Under transparent pictures.",
        metavar="COLOUR",
        group=INPUT,
        shapes=(IMAGE_LATENTS,),
        recorded=False,
    )

    @field_validator("outpaint", mode="before")
    @classmethod
    def _borders_in_a_flag(cls, value: Any) -> Any:
        borders = value.split(",") if isinstance(value, str) else value
        if isinstance(borders, list | tuple) and len(borders) != 4:
            raise ValueError("give four numbers of pixels: left,top,right,bottom")
        return borders

    @field_validator("image_background")
    @classmethod
    def _is_a_colour(cls, text: str) -> str:
        if not re.fullmatch(r"#[0-9a-fA-F]{6}", text):
            raise ValueError("give a colour as #rrggbb")
        return text.lower()

    @model_validator(mode="after")
    def _borders_are_no_crop(self) -> Self:
        if self.outpaint is not None and not any(self.outpaint):
            raise ValueError("outpaint adds nothing: give a number of pixels for one side at least")
        if self.padding_mask_crop is not None and self.resize_mode == "crop":
            raise ValueError("padding_mask_crop fills the size: leave it or resize_mode out")
        if self.outpaint is not None and self.padding_mask_crop is not None:
            raise ValueError("padding_mask_crop is for a mask inside: leave it or outpaint out")
        return self
