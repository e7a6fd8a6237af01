"""Which picture and mask each prompt begins with, and the size that these ask for."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.conditions.prompt_settings import PromptSettings
from common.conditions.sizes import MOST_PIXELS
from common.errors import BadInputFileError, BadSettingError
from common.files import artifacts
from common.files.input_pictures import picture_size, pictures_in
from common.files.row_places import layouts_by_ending
from common.files.stage_table import DENOISE, LATENTS_FILE
from common.messages import say

if TYPE_CHECKING:
    from common.runs.generation import GenerationConfig, RunSettings

Prompts = tuple[PromptSettings, ...]


def with_inputs(prompts: Prompts, settings: "RunSettings") -> Prompts:
    """The prompts, each with its picture and mask; one prompt is repeated for several pictures.

    Raises:
        BadSettingError: their numbers do not go together.
        BadInputFileError: a file or folder is not there.
    """
    images = _places(settings.image, "image")
    masks = _places(settings.mask_image, "mask_image")
    if len(images) > 1 and len(prompts) == 1 and prompts[0].image is None:
        (prompt,) = prompts
        ids = [None if prompt.id is None else f"{prompt.id}_{k:04d}" for k in range(len(images))]
        prompts = tuple(prompt.model_copy(update={"id": each}) for each in ids)
    prompts = _each_its_own(prompts, images, "image")
    return _each_its_own(prompts, masks, "mask_image")


def _places(asked: Sequence[str] | None, flag: str) -> list[str]:
    return [place for each in asked or () for place in pictures_in(each, flag)]


def _each_its_own(prompts: Prompts, places: list[str], field: str) -> Prompts:
    """Lay one picture or mask under all prompts that have none, or one under each."""
    if not places:
        return prompts
    if len(places) not in (1, len(prompts)):
        raise BadSettingError(
            f"--{field} names {len(places)} pictures for {len(prompts)} prompts: give one for all, "
            "or as many"
        )
    each = places * len(prompts) if len(places) == 1 else places
    return tuple(
        prompt if getattr(prompt, field) is not None else prompt.model_copy(update={field: place})
        for prompt, place in zip(prompts, each, strict=True)
    )


def size_of_pictures(
    prompts: Prompts, settings: "RunSettings", size_factor: int
) -> tuple[int, int] | None:
    """The height and width that the run's pictures have, borders to add included.

    Args:
        size_factor: to whose multiples they are rounded down, as in diffusers.

    Returns:
        None where the run has no pictures, or both are given.

    Raises:
        BadSettingError: the pictures have several sizes, and none is given.
    """
    places = list(dict.fromkeys(p.image for p in prompts if p.image is not None))
    if not places or (settings.height is not None and settings.width is not None):
        return None
    sizes = {picture_size(place, "image"): place for place in reversed(places)}
    if len(sizes) > 1:
        named = ", ".join(f"{place} {w}×{h}" for (h, w), place in list(sizes.items())[:-3:-1])
        raise BadSettingError(
            f"--image: the pictures have {len(sizes)} sizes ({named}, …): give --height and "
            "--width, to which all are brought"
        )
    ((height, width),) = sizes
    left, top, right, bottom = settings.outpaint or (0, 0, 0, 0)
    whole = (height + top + bottom, width + left + right)
    if not size_factor <= min(whole) <= max(whole) <= MOST_PIXELS:
        raise BadSettingError(
            f"--image: {places[0]} gives pictures of {whole[1]}×{whole[0]}, and these have at "
            f"least {size_factor} pixels a side, at most {MOST_PIXELS}: give --height and --width"
        )
    rounded = tuple(size // size_factor * size_factor for size in whole)
    if rounded != whole:
        say(
            f"  the picture's {whole[1]}×{whole[0]} are brought to {rounded[1]}×{rounded[0]}, "
            f"multiples of {size_factor}"
        )
    return rounded[0], rounded[1]


def refuse_odd_inputs(config: "GenerationConfig") -> None:
    """Raise `ValueError` for settings of a run that do not go with its pictures, or their lack."""
    for name in ("image", "mask_image"):
        have = [getattr(prompt, name) is not None for prompt in config.prompts]
        if any(have) and not all(have):
            raise ValueError(
                f"prompt {have.index(False) + 1} has no {name}, and others have: give one to all, "
                "or leave it out of this run"
            )
    masked = config.prompts[0].mask_image is not None
    if config.has_pictures and config.init_latents is not None:
        raise ValueError("give either image or init_latents to begin with, not both")
    if masked and not config.has_pictures:
        raise ValueError("mask_image is for pictures: give image")
    if masked and config.outpaint is not None:
        raise ValueError("outpaint makes its own mask: leave it or mask_image out")
    if config.outpaint is not None and not config.has_pictures:
        raise ValueError("outpaint is for pictures: give image")
    if config.strength is not None and not config.has_pictures and config.init_latents is None:
        raise ValueError("strength is for what a run begins with: give image or init_latents")
    for name in ("soft_mask", "padding_mask_crop", "keep_unmasked"):
        if getattr(config, name) not in (None, False) and not config.inpaints:
            raise ValueError(f"{name} is for masks: give mask_image")


def path_of_latents(place: str) -> Path:
    """The file of a run directory, or the file itself. Raises `BadInputFileError`: not there."""
    path = Path(place)
    path = path / LATENTS_FILE if path.is_dir() else path
    if not path.exists():
        raise BadInputFileError(
            f"--init_latents {place} is not there: name a run directory whose stage "
            f"{DENOISE.number} is done, or its {LATENTS_FILE}"
        )
    return path


def enlarged_size(cells: Sequence[int], upscale: float | None) -> tuple[int, ...]:
    """Rows and columns of latent cells, so many times as many, rounded."""
    return tuple(round(size * (upscale or 1)) for size in cells)


def size_of_latents(settings: "RunSettings", size_factor: int) -> tuple[int, int] | None:
    """The height and width of latents that are enlarged; None where none are.

    Args:
        size_factor: pixels per latent cell.

    Raises:
        BadInputFileError: the latents are not there, or are none.
    """
    if settings.upscale is None or settings.init_latents is None:
        return None
    path = path_of_latents(settings.init_latents)
    sizes = layouts_by_ending(artifacts.inspect(path, verify=False))
    layout = next(iter(sizes.values())).get("latents")  # several sizes are refused later on
    if layout is None or len(layout.shape) != 4:
        raise BadInputFileError(f"--init_latents: {path} holds no latents: choose another file")
    height, width = enlarged_size(layout.shape[2:], settings.upscale)
    return height * size_factor, width * size_factor
