"""What the tensors of each file must be for the next stage, said in words where they are not.

A row of `TENSORS` is all that is known of a tensor: the checks, the empty tensors that are compiled
for, and the table in the documentation follow from it.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field, ValidationError

from common.declared import EMBEDDINGS, LATENTS
from common.files.artifacts import Artifact, TensorLayout
from common.files.run_files import GENERATION_CONFIG_FILE
from common.files.stage_table import DECODE, DENOISE, EMBEDDINGS_FILE, LATENTS_FILE, TRAJECTORY_FILE

if TYPE_CHECKING:
    import torch

FLOATING_POINT = ("F64", "F32", "F16", "BF16")
TOKENS = 77  # of one chunk of a prompt

Known = Mapping[str, int]  # sizes by the letters of dimensions; others may have any size


@dataclass(frozen=True)
class Dimension:
    """What a letter in shapes stands for."""

    meaning: str
    of_unet: Callable[[Mapping[str, Any]], int] | None = None  # its size, by a UNet's config


def _pooled_width(unet: Mapping[str, Any]) -> int:
    six_numbers = 6 * int(unet["addition_time_embed_dim"])
    return int(unet["projection_class_embeddings_input_dim"]) - six_numbers


DIMENSIONS = {
    "P": Dimension("prompts"),
    "L": Dimension(f"tokens, {TOKENS} or a multiple"),
    "D": Dimension(
        "the UNet's `cross_attention_dim`", lambda unet: int(unet["cross_attention_dim"])
    ),
    "E": Dimension("the pooled embeddings' width, by the UNet's config", _pooled_width),
    "B": Dimension("images"),
    "C": Dimension("the VAE's `latent_channels`"),
    "h": Dimension("rows of latent cells"),
    "w": Dimension("columns of latent cells"),
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


def latents_misfit(tensors: Mapping[str, TensorLayout], vae: Mapping[str, Any]) -> str | None:
    """Compare stage 2's tensors with what a VAE needs, by its config.

    Returns what is wrong like `embeddings_misfit`.
    """
    rows, known = rows_of(LATENTS_FILE), {"C": vae["latent_channels"]}
    if missing := _missing(rows, tensors):
        return f"lacks {missing}"
    needs = f"; the VAE needs {known['C']} channels"
    misfits = (_misfit(row, tensors[row.name], known, needs) for row in rows)
    return next(filter(None, misfits), None) or _discord(rows, tensors)


def trajectory_misfit(
    tensors: Mapping[str, TensorLayout], own: Mapping[str, TensorLayout]
) -> str | None:
    """Compare a trajectory's tensors with those of the latents that fit the VAE.

    Returns what is wrong like `embeddings_misfit`.
    """
    rows = rows_of(TRAJECTORY_FILE)
    if missing := _missing(rows, tensors):
        return f"lacks {missing}"
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


class _Images(BaseModel):
    """The same of latents."""

    num_images_per_prompt: int = Field(ge=1)
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
        name = ".".join(map(str, error.errors()[0]["loc"]))
        return f"has no usable {name} in its header"
    for name in ("prompts_2", "negative_prompts", "negative_prompts_2"):
        if len(getattr(texts, name)) != len(texts.prompts):
            return f"has not as many {name} as prompts in its header"
    wanted, seeds = len(texts.prompts) * images.num_images_per_prompt, len(images.seeds)
    found = latents.tensors["latents"].shape[0]
    if not wanted == seeds == found:
        return f"holds latents of {found} images, its header names {seeds} seeds"
    return None


# --- documentation -------------------------------------------------------------------------------


def tensor_table() -> str:
    """All tensors of all files, and what the letters in their shapes mean, in Markdown."""
    lines = ["| file | tensor | shape | dtype | needed | read by |", "|---|---|---|---|---|---|"]
    for row in TENSORS:
        shape, dtypes = ", ".join(row.shape), ", ".join(row.dtypes) or "any"
        needed = (
            "always" if row.needed_by is None else "by UNets with `{}` {}".format(*row.needed_by)
        )
        cells = (f"`{row.file}`", f"`{row.name}`", f"[{shape}]", dtypes, needed, row.read_by)
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| letter | stands for |", "|---|---|"]
    lines += [f"| {letter} | {dimension.meaning} |" for letter, dimension in DIMENSIONS.items()]
    return "\n".join(lines) + "\n"
