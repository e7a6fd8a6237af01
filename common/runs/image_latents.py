"""The pictures of a run: read, checked, and what stage 0 writes of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.declared import IMAGE_LATENTS
from common.errors import BadInputFileError, StageError
from common.files import artifacts
from common.files.artifacts import Artifact
from common.files.contracts import image_latents_misfit
from common.files.input_pictures import (
    WHITE_FROM,
    hash_picture,
    read_mask,
    read_picture,
    with_borders,
)
from common.files.recipe import Recipe
from common.files.stage_table import ENCODE_PICTURES, IMAGE_LATENTS_FILE
from common.files.tensor_rows import WITH_CROP, WITH_MASK
from common.messages import say
from common.models.checkpoint import Checkpoint
from common.runs.generation import GenerationConfig

if TYPE_CHECKING:
    import numpy as np
    import torch

    from common.vae.encoder import Posterior
    from common.vae.laid_pictures import Laid

SOFT = range(16, 240)  # of 255: what of a mask is neither black nor white


@dataclass(frozen=True, kw_only=True)
class ReadInputs:
    """Pictures and masks of a run, in the order of the prompts; one where all have the same."""

    names: list[str]
    mask_names: list[str]
    pictures: "list[np.ndarray]"  # [H, W, 3] uint8
    masks: "list[np.ndarray]"  # [H, W] uint8; none without masks

    def hashes(self) -> dict[str, Any]:
        """What recipes hold of them: their pixels, not their names."""
        return {
            "pictures": [hash_picture(each) for each in self.pictures],
            "masks": [hash_picture(each) for each in self.masks],
        }

    def lay(self, config: GenerationConfig, factor: int) -> "Laid":
        """Lay them into the run's size.

        Args:
            factor: pixels per latent cell.
        """
        from common.vae.laid_pictures import Inputs, lay

        return lay(
            Inputs(pictures=self.pictures, masks=self.masks),
            (config.height, config.width),
            resize_mode=config.resize_mode,
            padding_mask_crop=config.padding_mask_crop,
            soft_masks=config.soft_mask,
            factor=factor,
        )


def cells_of(config: GenerationConfig, checkpoint: Checkpoint) -> tuple[int, int]:
    """Rows and columns of the run's latents."""
    factor = checkpoint.vae_scale_factor
    return config.height // factor, config.width // factor


def input_names(config: GenerationConfig) -> tuple[list[str], list[str]]:
    """The pictures and masks of the prompts, or the only one of each; masks may be none."""
    pairs = [(prompt.image, prompt.mask_image) for prompt in config.prompts]
    if len(set(pairs)) == 1:
        pairs = pairs[:1]
    images = [image for image, _ in pairs if image is not None]
    return images, [mask for _, mask in pairs if mask is not None]


def read_inputs(config: GenerationConfig) -> ReadInputs:
    """Read a run's pictures and masks.

    Raises:
        BadInputFileError: one cannot be read, masks nothing, or is of another size than its
            picture.
    """
    names, mask_names = input_names(config)
    known: dict[str, np.ndarray] = {}
    for name in names:
        if name not in known:
            known[name] = read_picture(name, config.image_background)
    pictures, masks = [known[name] for name in names], []
    if config.outpaint is not None:
        pairs = [with_borders(picture, config.outpaint) for picture in pictures]
        pictures, masks = [picture for picture, _ in pairs], [mask for _, mask in pairs]
    for name, picture in zip(mask_names, pictures, strict=False):
        masks.append(_checked_mask(name, picture, soft=config.soft_mask))
    if config.padding_mask_crop is not None and len({each.shape for each in pictures}) > 1:
        raise BadInputFileError(
            "--padding_mask_crop pastes into the whole pictures, which have several sizes here: "
            "make a run for each size"
        )
    return ReadInputs(names=names, mask_names=mask_names, pictures=pictures, masks=masks)


def _checked_mask(name: str, picture: "np.ndarray", *, soft: bool) -> "np.ndarray":
    mask = read_mask(name)
    if mask.shape != picture.shape[:2]:
        (height, width), (own_height, own_width) = picture.shape[:2], mask.shape
        raise BadInputFileError(
            f"--mask_image {name} is {own_width}×{own_height}, its picture {width}×{height}: give "
            "a mask of the picture's size"
        )
    if not (mask >= (1 if soft else WHITE_FROM)).any():
        raise BadInputFileError(
            f"--mask_image {name} masks nothing: paint white what is to be made anew"
        )
    grey = ((mask >= SOFT.start) & (mask < SOFT.stop)).mean()
    if grey > 0 and not soft:
        say(
            f"  {name}: {grey:.1%} of it is grey, which counts as white from {WHITE_FROM} on; "
            "--soft_mask takes it for what it is"
        )
    return mask


def image_tensors(
    laid: "Laid", read: ReadInputs, encoded: "Mapping[str, Posterior]", factor: int
) -> "dict[str, torch.Tensor]":
    """What stage 0 writes.

    Args:
        encoded: posteriors by what begins their tensors' names.
        factor: pixels per latent cell.
    """
    import numpy as np
    import torch

    tensors: dict[str, torch.Tensor] = {}
    for name, posterior in encoded.items():
        tensors[f"{name}_mean"] = torch.from_numpy(posterior.mean)
        tensors[f"{name}_std"] = torch.from_numpy(posterior.std)
    pixels = (laid.pictures / 2 + 0.5) * 255
    tensors["pictures"] = pixels.round().to(torch.uint8).permute(0, 2, 3, 1)
    if laid.masks is not None:
        tensors["latent_masks"] = laid.latent_masks(factor)
        tensors["masks"] = (laid.masks[:, 0] * 255).round().to(torch.uint8)
    if laid.crops is not None:
        tensors["crops"] = laid.crops
        tensors["whole_pictures"] = torch.from_numpy(np.stack(read.pictures))
        tensors["whole_masks"] = torch.from_numpy(np.stack(read.masks))
    return tensors


def find_image_latents(
    config: GenerationConfig, checkpoint: Checkpoint, folder: Path, *, verify: bool
) -> Artifact | None:
    """What stage 0 wrote of the run's pictures; None where the run has none.

    Args:
        folder: that it is in.
        verify: as `artifacts.inspect`.

    Raises:
        BadInputFileError: it is not there, damaged, or of other pictures.
    """
    if not config.has_pictures:
        return None
    found = artifacts.inspect(folder / IMAGE_LATENTS_FILE, verify=verify)
    settings = [WITH_MASK] if config.inpaints else []
    settings += [WITH_CROP] if config.padding_mask_crop is not None else []
    misfit = image_latents_misfit(
        found.tensors,
        checkpoint.config("vae"),
        prompts=len(config.prompts),
        size=(config.height, config.width),
        cells=cells_of(config, checkpoint),
        settings=settings,
    )
    artifacts.refuse_misfit(found, misfit or _pictures_misfit(found, config))
    return found


def find_pasted_into(
    config: GenerationConfig, checkpoint: Checkpoint, folder: Path, *, verify: bool
) -> Artifact | None:
    """The same where a run's pictures are pasted into those that they began with; None else."""
    return find_image_latents(config, checkpoint, folder, verify=verify) if config.pastes else None


def _pictures_misfit(found: Artifact, config: GenerationConfig) -> str | None:
    """Say where other pictures were encoded than the run's settings name."""
    if found.header is None:
        return None
    if found.header.recipe.stage != ENCODE_PICTURES.number:
        return f"says that stage {found.header.recipe.stage} made it"
    names = dict(zip(("images", "mask_images"), input_names(config), strict=True))
    made = {name: found.header.provenance.get(name) for name in names}
    other = next((name for name in names if made[name] != names[name]), None)
    if other is None or _have_pixels_of(found.header.recipe, config):
        return None
    was, wanted = (str(each[other])[:60] for each in (made, names))
    return f"was made of other {other} ({was}) than the run's ({wanted})"


def _have_pixels_of(made: Recipe, config: GenerationConfig) -> bool:
    """Whether the run's pictures, under other names, are those that were encoded."""
    try:
        own = read_inputs(config).hashes()
    except StageError:
        return False
    return own.items() <= made.settings_of(IMAGE_LATENTS).items()
