"""What the tensors of each file must be for the next stage, said in words where they are not."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field, ValidationError

from common.files.artifacts import Artifact, TensorLayout
from common.runs.generation import GENERATION_CONFIG_FILE

if TYPE_CHECKING:
    import torch

FLOATING_POINT = ("F64", "F32", "F16", "BF16")


def embeddings_misfit(
    tensors: Mapping[str, TensorLayout], prompts: int, unet: dict[str, Any]
) -> str | None:
    """Compare stage 1's tensors with what a UNet needs.

    Args:
        tensors: prompt_embeds, negative_prompt_embeds [P, L, D]; for a `text_time` UNet also
            pooled_prompt_embeds, negative_pooled_prompt_embeds [P, E].
        prompts: P by the settings.
        unet: the UNet's config, which gives D and E.

    Returns:
        What is wrong, as the end of a sentence that begins with the file's name; None where all
        fits.
    """
    widths = embeddings_widths(unet)
    missing = [name for name in widths if name not in tensors]
    if missing:
        return f"lacks {', '.join(missing)}, which the checkpoint's UNet needs"
    for name, width in widths.items():
        shape = tensors[name].shape
        if tensors[name].dtype not in FLOATING_POINT:
            return f"holds {name} as {tensors[name].dtype}, not as floating-point numbers"
        if len(shape) != (2 if "pooled" in name else 3) or shape[-1] != width or 0 in shape:
            return f"holds {name} of shape {shape}; the checkpoint's UNet needs a width of {width}"
        if shape[0] != prompts:
            return f"holds {shape[0]} prompts; {GENERATION_CONFIG_FILE} has {prompts}"
    if tensors["prompt_embeds"].shape != tensors["negative_prompt_embeds"].shape:
        return "holds prompt_embeds and negative_prompt_embeds of different shapes"
    return None


def embeddings_widths(unet: dict[str, Any]) -> dict[str, int]:
    """The tensors that a UNet needs from stage 1, and their last dimension."""
    widths = dict.fromkeys(("prompt_embeds", "negative_prompt_embeds"), unet["cross_attention_dim"])
    if unet.get("addition_embed_type") == "text_time":
        pooled = unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]
        widths |= dict.fromkeys(("pooled_prompt_embeds", "negative_pooled_prompt_embeds"), pooled)
    return widths


def empty_embeddings(prompts: int, unet: dict[str, Any]) -> "dict[str, torch.Tensor]":
    """Zeros in the shapes of stage 1's tensors for so many prompts of up to 77 tokens."""
    import torch

    return {
        name: torch.zeros(prompts, *(() if "pooled" in name else (77,)), width)
        for name, width in embeddings_widths(unet).items()
    }


class _ImageSettings(BaseModel):
    """The settings in the header of latents by which each picture is told its own."""

    prompts: list[str]
    prompts_2: list[str | None]
    negative_prompts: list[str | None]
    negative_prompts_2: list[str | None]
    num_images_per_prompt: int = Field(ge=1)
    seeds: list[int]


def header_misfit(latents: Artifact) -> str | None:
    """Compare the header of latents that fit the VAE with their number.

    Returns what is wrong like `embeddings_misfit`.
    """
    if latents.header is None:
        return None
    if latents.header.recipe.stage != 2:
        return f"says that stage {latents.header.recipe.stage} made it"
    try:
        settings = _ImageSettings.model_validate(latents.header.recipe.settings)
    except ValidationError as error:
        name = ".".join(map(str, error.errors()[0]["loc"]))
        return f"has no usable {name} in its header"
    for name in ("prompts_2", "negative_prompts", "negative_prompts_2"):
        if len(getattr(settings, name)) != len(settings.prompts):
            return f"has not as many {name} as prompts in its header"
    images = len(settings.prompts) * settings.num_images_per_prompt
    found = latents.tensors["latents"].shape[0]
    if not images == len(settings.seeds) == found:
        return f"holds latents of {found} images, its header names {len(settings.seeds)} seeds"
    return None


def latents_misfit(tensors: Mapping[str, TensorLayout], vae: dict[str, Any]) -> str | None:
    """Compare stage 2's tensors with what a VAE needs: latents [B, C, h, w].

    Returns what is wrong like `embeddings_misfit`.
    """
    if "latents" not in tensors:
        return "lacks latents"
    latents = tensors["latents"]
    shape = latents.shape
    if latents.dtype not in FLOATING_POINT:
        return f"holds latents as {latents.dtype}, not as floating-point numbers"
    if len(shape) != 4 or 0 in shape or shape[1] != vae["latent_channels"]:
        return f"holds latents of shape {shape}; the VAE needs {vae['latent_channels']} channels"
    return None


def trajectory_misfit(
    tensors: Mapping[str, TensorLayout], own: Mapping[str, TensorLayout]
) -> str | None:
    """Compare a trajectory's tensors, latents [S, B, C, h, w] and steps [S], with the latents'.

    Returns what is wrong like `embeddings_misfit`.
    """
    if missing := {"latents", "steps"} - tensors.keys():
        return f"lacks {', '.join(sorted(missing))}"
    latents, steps = tensors["latents"], tensors["steps"].shape
    if latents.dtype not in FLOATING_POINT:
        return f"holds latents as {latents.dtype}, not as floating-point numbers"
    if 0 in latents.shape or latents.shape != (*steps, *own["latents"].shape):
        return (
            f"holds latents of shape {latents.shape}, those of the run are {own['latents'].shape}"
        )
    return None
