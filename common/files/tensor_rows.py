"""Every tensor that a stage writes for another one: its name, shape by letters, dtypes, readers."""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from common.files.stage_table import (
    DECODE,
    DENOISE,
    EMBEDDINGS_FILE,
    IMAGE_LATENTS_FILE,
    LATENTS_FILE,
    TRAJECTORY_FILE,
)

FLOATING_POINT = ("F64", "F32", "F16", "BF16")
WITH_MASK, WITH_CROP = "a mask", "`--padding_mask_crop`"  # of runs that have some tensors
TOKENS = 77  # of one chunk of a prompt

Known = Mapping[str, int]  # sizes by the letters of dimensions; others may have any size


def names_as_given(names: Container[str]) -> tuple[str, str]:
    """Stage 0's tensors of pictures and masks as they were given: whole where there are crops.

    Args:
        names: of all of its tensors.
    """
    return ("whole_pictures", "whole_masks") if "crops" in names else ("pictures", "masks")


def known_names(file: str, names: Iterable[str]) -> list[str]:
    """Those of a file's tensors that a stage reads; of a file of another name all of them."""
    known = {row.name for row in TENSORS if row.file == file}
    return [name for name in names if not known or name in known]


def row_of_picture(prompt: int, pictures: int) -> int:
    """The row of stage 0's tensors that a prompt has: one for each, or one for all."""
    return prompt if pictures > 1 else 0


@dataclass(frozen=True)
class Dimension:
    """What a letter in shapes stands for."""

    meaning: str
    of_unet: Callable[[Mapping[str, Any]], int] | None = None  # its size, by a UNet's config


def _pooled_width(unet: Mapping[str, Any]) -> int:
    # Original size, crop, target size; of SDXL's refiner a score in the last one's place.
    numbers = 5 if unet.get("requires_aesthetics_score") else 6
    told = numbers * int(unet["addition_time_embed_dim"])
    return int(unet["projection_class_embeddings_input_dim"]) - told


DIMENSIONS = {
    "P": Dimension("prompts"),
    "L": Dimension(f"tokens, {TOKENS} or a multiple"),
    "D": Dimension(
        "the UNet's `cross_attention_dim`", lambda unet: int(unet["cross_attention_dim"])
    ),
    "E": Dimension("the pooled embeddings' width, by the UNet's config", _pooled_width),
    "I": Dimension("pictures to begin with: one for each prompt, or one for all"),
    "B": Dimension("images"),
    "C": Dimension("the VAE's `latent_channels`"),
    "h": Dimension("rows of latent cells"),
    "w": Dimension("columns of latent cells"),
    "H": Dimension("rows of pixels"),
    "W": Dimension("columns of pixels"),
    "R": Dimension("rows of a whole picture, of which a crop is made anew"),
    "Q": Dimension("its columns"),
    "1": Dimension("one"),
    "4": Dimension("x, y of a crop's corners"),
    "3": Dimension("red, green, blue"),
    "S": Dimension("steps that are kept"),
}


@dataclass(frozen=True, kw_only=True)
class TensorRow:
    """A tensor of an artifact."""

    file: str
    name: str
    shape: tuple[str, ...]  # of `DIMENSIONS`
    read_by: str
    dtypes: tuple[str, ...] = FLOATING_POINT  # as safetensors names them; none: any
    # A key of the UNet's config and the value that needs the tensor; None: all UNets do.
    needed_by: tuple[str, Any] | None = None
    with_setting: str | None = None  # of runs with this setting alone

    def is_needed(self, unet: Mapping[str, Any]) -> bool:
        """Whether a UNet needs it, by its config."""
        return self.needed_by is None or unet.get(self.needed_by[0]) == self.needed_by[1]

    def fits(self, shape: tuple[int, ...], known: Known) -> bool:
        """Whether a shape has these dimensions, those that are known in their size."""
        return (
            len(shape) == len(self.shape)
            and 0 not in shape
            and all(size == known.get(letter, size) for letter, size in self.sizes(shape))
        )

    def sizes(self, shape: tuple[int, ...]) -> Iterator[tuple[str, int]]:
        """A shape's sizes, each with its letter."""
        return zip(self.shape, shape, strict=True)


_SIZES_TOO = ("addition_embed_type", "text_time")  # SDXL's

TENSORS: tuple[TensorRow, ...] = (
    TensorRow(
        file=EMBEDDINGS_FILE,
        name="prompt_embeds",
        shape=("P", "L", "D"),
        read_by=f"{DENOISE.name}: the UNet's cross-attention",
    ),
    TensorRow(
        file=EMBEDDINGS_FILE,
        name="negative_prompt_embeds",
        shape=("P", "L", "D"),
        read_by=f"{DENOISE.name}: the same without the prompt, for guidance",
    ),
    TensorRow(
        file=EMBEDDINGS_FILE,
        name="pooled_prompt_embeds",
        shape=("P", "E"),
        read_by=f"{DENOISE.name}: the UNet's added conditions",
        needed_by=_SIZES_TOO,
    ),
    TensorRow(
        file=EMBEDDINGS_FILE,
        name="negative_pooled_prompt_embeds",
        shape=("P", "E"),
        read_by=f"{DENOISE.name}: the same without the prompt, for guidance",
        needed_by=_SIZES_TOO,
    ),
    TensorRow(
        file=IMAGE_LATENTS_FILE,
        name="image_latents_mean",
        shape=("I", "C", "h", "w"),
        read_by=f"{DENOISE.name}: the latents that images begin with are drawn by it",
    ),
    TensorRow(
        file=IMAGE_LATENTS_FILE,
        name="image_latents_std",
        shape=("I", "C", "h", "w"),
        read_by=f"{DENOISE.name}: likewise",
    ),
    TensorRow(
        file=IMAGE_LATENTS_FILE,
        name="pictures",
        shape=("I", "H", "W", "3"),
        dtypes=("U8",),
        read_by=f"{DECODE.name}: what stays, with `--keep_unmasked`",
    ),
    *(
        TensorRow(
            file=IMAGE_LATENTS_FILE,
            name=name,
            shape=shape,
            dtypes=dtypes,
            read_by=read_by,
            with_setting=WITH_MASK,
        )
        for name, shape, dtypes, read_by in (
            (
                "masked_image_latents_mean",
                ("I", "C", "h", "w"),
                FLOATING_POINT,
                f"{DENOISE.name}: UNets of nine channels are shown them",
            ),
            (
                "masked_image_latents_std",
                ("I", "C", "h", "w"),
                FLOATING_POINT,
                f"{DENOISE.name}: likewise",
            ),
            (
                "latent_masks",
                ("I", "1", "h", "w"),
                FLOATING_POINT,
                f"{DENOISE.name}: 1 is made anew",
            ),
            ("masks", ("I", "H", "W"), ("U8",), f"{DECODE.name}: with `--keep_unmasked`"),
        )
    ),
    *(
        TensorRow(
            file=IMAGE_LATENTS_FILE,
            name=name,
            shape=shape,
            dtypes=dtypes,
            read_by=f"{DECODE.name}: what is pasted into what",
            with_setting=WITH_CROP,
        )
        for name, shape, dtypes in (
            ("crops", ("I", "4"), ("I64",)),
            ("whole_pictures", ("I", "R", "Q", "3"), ("U8",)),
            ("whole_masks", ("I", "R", "Q"), ("U8",)),
        )
    ),
    TensorRow(
        file=LATENTS_FILE,
        name="latents",
        shape=("B", "C", "h", "w"),
        read_by=f"{DECODE.name}: the VAE's decoder",
    ),
    TensorRow(
        file=TRAJECTORY_FILE,
        name="latents",
        shape=("S", "B", "C", "h", "w"),
        read_by=f"{DECODE.name}: the VAE's decoder",
    ),
    TensorRow(
        file=TRAJECTORY_FILE,
        name="steps",
        shape=("S",),
        read_by="nothing; the numbers of the steps",
        dtypes=(),
    ),
)
