"""What the tensors of each file must be for the next stage, said in words where they are not.

A row of `TENSORS` is all that is known of a tensor: the checks, the empty tensors that are compiled
for, and the table in the documentation follow from it.
"""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from common.declared import EMBEDDINGS, LATENTS
from common.files.artifacts import Artifact, TensorLayout
from common.files.row_places import layouts_by_ending, row_places
from common.files.run_files import GENERATION_CONFIG_FILE
from common.files.stage_table import (
    DENOISE,
    EMBEDDINGS_FILE,
    IMAGE_LATENTS_FILE,
    LATENTS_FILE,
    TRAJECTORY_FILE,
)
from common.files.tensor_rows import DIMENSIONS, TENSORS, TOKENS, Known, TensorRow

if TYPE_CHECKING:
    import torch


def rows_of(file: str) -> list[TensorRow]:
    """The tensors of an artifact's file."""
    return [row for row in TENSORS if row.file == file]


# --- checks --------------------------------------------------------------------------------------


def embeddings_misfit(
    tensors: Mapping[str, TensorLayout], prompts: int, unet: Mapping[str, Any]
) -> str | None:
    """Compare stage 1's tensors with what a UNet needs.

    Args:
        prompts: P by the settings.
        unet: the UNet's config, which gives D and E.

    Returns:
        What is wrong, as the end of a sentence that begins with the file's name; None where all
        fits.
    """
    rows, widths = needed_embeddings(unet), unet_widths(unet)
    if missing := _missing(rows, tensors):
        return f"lacks {missing}, which the checkpoint's UNet needs"
    for row in rows:
        width = widths.get(row.shape[-1])
        needs = "" if width is None else f"; the checkpoint's UNet needs a width of {width}"
        if misfit := _misfit(row, tensors[row.name], widths, needs):
            return misfit
        count = dict(row.sizes(tensors[row.name].shape)).get("P", prompts)
        if count != prompts:
            return f"holds {count} prompts; {GENERATION_CONFIG_FILE} has {prompts}"
    return _discord(rows, tensors)


def latents_misfit(latents: Artifact, vae: Mapping[str, Any]) -> str | None:
    """Compare stage 2's tensors with what a VAE needs, by its config.

    Returns what is wrong like `embeddings_misfit`.
    """
    rows, known = rows_of(LATENTS_FILE), {"C": vae["latent_channels"]}
    needs = f"; the VAE needs {known['C']} channels"
    for own in layouts_by_ending(latents).values():
        if missing := _missing(rows, own):
            return f"lacks {missing}"
        misfits = (_misfit(row, own[row.name], known, needs) for row in rows)
        if misfit := next(filter(None, misfits), None) or _discord(rows, own):
            return misfit
    return None


def latents_shapes(latents: Artifact) -> list[tuple[int, ...]]:
    """The shape [B, C, h, w] of stage 2's latents of each size."""
    return [own["latents"].shape for own in layouts_by_ending(latents).values()]


def image_latents_misfit(
    tensors: Mapping[str, TensorLayout],
    vae: Mapping[str, Any],
    *,
    prompts: int,
    size: tuple[int, int],
    cells: tuple[int, int],
    settings: Collection[str],
) -> str | None:
    """Compare stage 0's tensors with what a run and its VAE need.

    Args:
        size: the pictures' height and width.
        cells: the latents'.
        settings: those of rows' `with_setting` that the run has.

    Returns what is wrong like `embeddings_misfit`.
    """
    rows = [
        row
        for row in rows_of(IMAGE_LATENTS_FILE)
        if row.with_setting is None or row.with_setting in settings
    ]
    if missing := _missing(rows, tensors):
        return f"lacks {missing}"
    known = {"C": int(vae["latent_channels"]), "1": 1, "3": 3, "4": 4}
    known |= dict(zip("HWhw", (*size, *cells), strict=True))
    needs = f"; the run is of {size[1]}×{size[0]} pixels and its VAE of {known['C']} channels"
    for row in rows:
        if misfit := _misfit(row, tensors[row.name], known, needs):
            return misfit
    count = tensors["image_latents_mean"].shape[0]
    if count not in (1, prompts):
        return f"holds {count} pictures; {GENERATION_CONFIG_FILE} has {prompts} prompts"
    return _discord(rows, tensors)


def trajectory_misfit(
    tensors: Mapping[str, TensorLayout], own: Mapping[str, TensorLayout]
) -> str | None:
    """Compare a trajectory's tensors with those of the latents that fit the VAE.

    Returns what is wrong like `embeddings_misfit`.
    """
    rows = rows_of(TRAJECTORY_FILE)
    if missing := _missing(rows, tensors):
        return f"lacks {missing}"
    if "latents" not in own:
        return "is of one size, and the latents of several"
    (latents,) = (row for row in rows_of(LATENTS_FILE) if row.name == "latents")
    known = dict(latents.sizes(own["latents"].shape))
    steps = tensors["steps"].shape
    known["S"] = steps[0] if len(steps) == 1 else 0  # which nothing fits
    needs = f", those of the run are {own['latents'].shape}"
    misfits = (_misfit(row, tensors[row.name], known, needs) for row in rows)
    return next(filter(None, misfits), None)


def _missing(rows: list[TensorRow], tensors: Mapping[str, TensorLayout]) -> str:
    """The names of the tensors that are not there."""
    return ", ".join(row.name for row in rows if row.name not in tensors)


def _misfit(row: TensorRow, found: TensorLayout, known: Known, needs: str) -> str | None:
    """What is wrong with a tensor by itself; `needs` ends the sentence on its shape."""
    if row.dtypes and found.dtype not in row.dtypes:
        return f"holds {row.name} as {found.dtype}, not as floating-point numbers"
    if not row.fits(found.shape, known):
        return f"holds {row.name} of shape {found.shape}{needs}"
    return None


def _discord(rows: list[TensorRow], tensors: Mapping[str, TensorLayout]) -> str | None:
    """Two tensors that each fit, and have a dimension in common in different sizes."""
    first: dict[str, tuple[str, int]] = {}
    for row in rows:
        for letter, size in row.sizes(tensors[row.name].shape):
            name, other = first.setdefault(letter, (row.name, size))
            if size != other:
                return f"holds {name} and {row.name} of different shapes"
    return None


def needed_embeddings(unet: Mapping[str, Any]) -> list[TensorRow]:
    """The tensors that a UNet needs of stage 1, by its config."""
    return [row for row in rows_of(EMBEDDINGS_FILE) if row.is_needed(unet)]


def unet_widths(unet: Mapping[str, Any]) -> dict[str, int]:
    """The sizes of those tensors' dimensions that the UNet's config gives, by their letters."""
    letters = {letter for row in needed_embeddings(unet) for letter in row.shape}
    rules = {letter: DIMENSIONS[letter].of_unet for letter in sorted(letters)}
    return {letter: rule(unet) for letter, rule in rules.items() if rule is not None}


def empty_embeddings(prompts: int, unet: Mapping[str, Any]) -> "dict[str, torch.Tensor]":
    """Zeros in the shapes of stage 1's tensors for so many prompts of up to 77 tokens."""
    import torch

    sizes = {"P": prompts, "L": TOKENS, **unet_widths(unet)}
    return {
        row.name: torch.zeros([sizes[letter] for letter in row.shape])
        for row in needed_embeddings(unet)
    }


# --- the header ----------------------------------------------------------------------------------


class _Prompts(BaseModel):
    """The settings of embeddings by which each picture is told its own."""

    prompts: list[str]
    prompts_2: list[str | None]
    negative_prompts: list[str | None]
    negative_prompts_2: list[str | None]


Positive = Annotated[int, Field(ge=1)]


class _Images(BaseModel):
    """The same of latents."""

    num_images_per_prompt: Positive | list[Positive]  # of all prompts, or of each
    seeds: list[int]


def header_misfit(latents: Artifact) -> str | None:
    """Compare the header of latents that fit the VAE with their number.

    Returns what is wrong like `embeddings_misfit`.
    """
    if latents.header is None:
        return None
    recipe = latents.header.recipe
    if recipe.stage != DENOISE.number:
        return f"says that stage {recipe.stage} made it"
    try:
        texts = _Prompts.model_validate(recipe.settings_of(EMBEDDINGS))
        images = _Images.model_validate(recipe.settings_of(LATENTS))
    except ValidationError as error:
        name = error.errors()[0]["loc"][0]
        return f"has no usable {name} in its header"
    for name in ("prompts_2", "negative_prompts", "negative_prompts_2"):
        if len(getattr(texts, name)) != len(texts.prompts):
            return f"has not as many {name} as prompts in its header"
    of_each, seeds = images.num_images_per_prompt, len(images.seeds)
    wanted = sum(of_each) if isinstance(of_each, list) else len(texts.prompts) * of_each
    found = len(row_places(latents))
    if not wanted == seeds == found:
        return f"holds latents of {found} images, its header names {seeds} seeds"
    return None


# --- documentation -------------------------------------------------------------------------------


def tensor_table() -> str:
    """All tensors of all files, and what the letters in their shapes mean, in Markdown."""
    lines = ["| file | tensor | shape | dtype | needed | read by |", "|---|---|---|---|---|---|"]
    for row in TENSORS:
        shape, dtypes = ", ".join(row.shape), ", ".join(row.dtypes) or "any"
        needed = "always" if row.with_setting is None else f"with {row.with_setting}"
        if row.needed_by is not None:
            needed = "by UNets with `{}` {}".format(*row.needed_by)
        cells = (f"`{row.file}`", f"`{row.name}`", f"[{shape}]", dtypes, needed, row.read_by)
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| letter | stands for |", "|---|---|"]
    lines += [f"| {letter} | {dimension.meaning} |" for letter, dimension in DIMENSIONS.items()]
    return "\n".join(lines) + "\n"
