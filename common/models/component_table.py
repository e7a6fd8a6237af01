"""The components of a checkpoint: what each must be, which stage loads it, what may change it.

A row of `COMPONENTS` is all that the project knows of a component before it is loaded: which
classes are run, what of its config is read and checked, the setting that puts another one in its
place, a LoRA's layers for it. Nothing else lists components.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from common.declared import EMBEDDINGS, IMAGE_LATENTS, LATENTS, PICTURES
from common.errors import first_refusal

# diffusers' pipelines that a checkpoint may name, and the text-to-image one with the same parts.
SDXL, SD = "StableDiffusionXLPipeline", "StableDiffusionPipeline"
PIPELINES = {
    SDXL: SDXL,
    "StableDiffusionXLImg2ImgPipeline": SDXL,
    "StableDiffusionXLInpaintPipeline": SDXL,
    "StableDiffusionXLInstructPix2PixPipeline": SDXL,
    SD: SD,
    "StableDiffusionImg2ImgPipeline": SD,
    "StableDiffusionInpaintPipeline": SD,
    "StableDiffusionInstructPix2PixPipeline": SD,
}
# What SDXL's refiner has not, and the mark in its index that its UNet is told aesthetic scores.
REFINERS_LACK = ("tokenizer", "text_encoder")
AESTHETICS = "requires_aesthetics_score"
# Modules that diffusers may import for a component; the last holds its own safety checker.
LIBRARIES = ("diffusers", "transformers", "stable_diffusion")

Count = Annotated[int, Field(ge=1, le=1_000_000)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Channels = Annotated[list[Count], Field(min_length=1, max_length=16)]


# --- what is read of configs ---------------------------------------------------------------------


class ComponentConfig(BaseModel):
    """What of a component's config is read, checked before anything is built by it."""

    model_config = ConfigDict(strict=True)  # a number is no text


class _UNetConfig(ComponentConfig):
    sample_size: Count
    in_channels: Count
    out_channels: Count = 4
    block_out_channels: Channels
    cross_attention_dim: Count
    time_cond_proj_dim: Count | None = None
    addition_embed_type: str | None = None
    addition_time_embed_dim: Count | None = None
    requires_aesthetics_score: bool = False  # of the index
    projection_class_embeddings_input_dim: Count | None = None

    @model_validator(mode="after")
    def _has_what_size_conditions_need(self) -> Self:
        sizes = (self.addition_time_embed_dim, self.projection_class_embeddings_input_dim)
        if self.addition_embed_type == "text_time" and None in sizes:
            raise ValueError(
                "addition_embed_type text_time needs addition_time_embed_dim and "
                "projection_class_embeddings_input_dim"
            )
        return self


class _VaeConfig(ComponentConfig):
    block_out_channels: Channels
    latent_channels: Count
    sample_size: Count | Annotated[list[Count], Field(min_length=1)] = 32
    force_upcast: bool = True
    scaling_factor: Number = 0.18215
    latents_mean: list[Number] | None = None
    latents_std: list[Number] | None = None

    @model_validator(mode="before")
    @classmethod
    def _levels_are_the_decoders(cls, values: Any) -> Any:
        """`AutoencoderTiny` names them for its two halves; diffusers takes the decoder's."""
        if isinstance(values, dict) and "decoder_block_out_channels" in values:
            return {"block_out_channels": values["decoder_block_out_channels"], **values}
        return values

    @model_validator(mode="after")
    def _one_statistic_for_each_channel(self) -> Self:
        for values in (self.latents_mean, self.latents_std):
            if values is not None and len(values) != self.latent_channels:
                raise ValueError("latents_mean and latents_std need a number for each channel")
        return self


class _SchedulerConfig(ComponentConfig):
    class_name: str = Field(alias="_class_name")
    num_train_timesteps: Count = 1000


class _TextEncoderConfig(ComponentConfig):
    num_hidden_layers: Count


# --- the table -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Component:
    """A row of the table."""

    name: str  # in `model_index.json`; its folder's as well
    title: str = ""  # what people call it
    library: str = "diffusers"  # that has its classes
    classes: tuple[str, ...] = ()  # that a stage can run, the usual one first; none: any
    config: type[ComponentConfig] | None = None  # what of its config is read
    config_file: str = "config.json"
    # What its config must say for a stage to run it: key → values.
    supported: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    has_weights: bool = True
    loaded_for: tuple[str, ...] = ()  # the artifacts whose stages read it
    needed: bool = False  # by every pipeline; else read where a checkpoint has it
    replaceable: bool = False  # by a setting of its name; diffusers' models only
    # What names of its weights begin with in files of a whole checkpoint, or of tools.
    file_prefixes: tuple[str, ...] = ()
    # What names of its modules in LoRA files begin with, and how they begin without that.
    lora_prefixes: tuple[str, ...] = ()
    lora_bare: tuple[str, ...] = ()


_TOKENIZER: dict[str, Any] = dict(
    library="transformers",
    classes=("CLIPTokenizer", "CLIPTokenizerFast"),
    has_weights=False,
    loaded_for=(EMBEDDINGS,),
)
_TEXT_ENCODER: dict[str, Any] = dict(
    library="transformers", config=_TextEncoderConfig, loaded_for=(EMBEDDINGS,)
)

# In the order in which they are checked, read and named.
COMPONENTS: tuple[Component, ...] = (
    Component(
        name="unet",
        title="UNet",
        classes=("UNet2DConditionModel",),
        config=_UNetConfig,
        # What it may be told besides the prompt.
        supported={
            "addition_embed_type": (None, "text_time"),
            "encoder_hid_dim_type": (None,),
            "class_embed_type": (None,),
        },
        loaded_for=(LATENTS,),
        needed=True,
        replaceable=True,
        file_prefixes=("model.diffusion_model.", "diffusion_model.", "unet."),
        lora_prefixes=(
            *("unet.", "lora_unet_", "lora_unet.", "lycoris_unet_", "unet_lora_layers."),
            *("diffusion_model.", "model.diffusion_model."),
        ),
        lora_bare=(
            *("down_blocks.", "mid_block.", "up_blocks.", "conv_in", "conv_out", "conv_norm_out"),
            *("time_embedding.", "add_embedding.", "time_embed.", "label_emb."),
            *("input_blocks.", "middle_block.", "output_blocks.", "out."),
        ),
    ),
    Component(
        name="vae",
        title="VAE",
        classes=("AutoencoderKL", "AutoencoderTiny"),
        config=_VaeConfig,
        loaded_for=(IMAGE_LATENTS, PICTURES),
        needed=True,
        replaceable=True,
        file_prefixes=("first_stage_model.", "vae."),
    ),
    Component(
        name="scheduler",
        config=_SchedulerConfig,
        config_file="scheduler_config.json",
        has_weights=False,
        loaded_for=(LATENTS,),
        needed=True,
    ),
    Component(name="tokenizer", needed=True, **_TOKENIZER),
    Component(
        name="text_encoder",
        title="text encoder",
        classes=("CLIPTextModel",),
        needed=True,
        file_prefixes=(
            *("conditioner.embedders.0.transformer.", "cond_stage_model.transformer."),
            *("cond_stage_model.model.", "text_encoders.clip_l.transformer."),
        ),
        lora_prefixes=(
            *("text_encoder.", "text_encoder_1.", "lora_te_", "lora_te1_", "lora_te1.", "clip_l."),
            *("te1.", "te.", "text_encoders.clip_l.transformer.", "text_encoder_lora_layers."),
            *("conditioner.embedders.0.transformer.", "cond_stage_model.transformer."),
        ),
        lora_bare=("text_model.", "encoder.layers."),
        **_TEXT_ENCODER,
    ),
    Component(name="tokenizer_2", **_TOKENIZER),
    Component(
        name="text_encoder_2",
        title="second text encoder",
        classes=("CLIPTextModelWithProjection",),
        file_prefixes=(
            *("conditioner.embedders.1.model.", "conditioner.embedders.0.model."),
            "text_encoders.clip_g.transformer.",
        ),
        lora_prefixes=(
            *("text_encoder_2.", "lora_te2_", "lora_te2.", "clip_g.", "te2."),
            *("text_encoders.clip_g.transformer.", "text_encoder_2_lora_layers."),
        ),
        **_TEXT_ENCODER,
    ),
    # Listed by checkpoints, read by no stage.
    Component(name="safety_checker"),
    Component(name="feature_extractor"),
    Component(name="image_encoder"),
)


def component(name: str) -> Component:
    """A component's row."""
    return {row.name: row for row in COMPONENTS}[name]


def loaded_for(artifact: str) -> tuple[str, ...]:
    """The components that the stage reads which makes an artifact."""
    return tuple(row.name for row in COMPONENTS if artifact in row.loaded_for)


def text_encoders() -> list[str]:
    """The names of the text encoders that a checkpoint may have."""
    return [name for name in loaded_for(EMBEDDINGS) if component(name).has_weights]


def config_files() -> list[str]:
    """The names that components' configs have in their folders."""
    return sorted({row.config_file for row in COMPONENTS})


def replaceable() -> list[Component]:
    """Those that a setting of their name may replace."""
    return [row for row in COMPONENTS if row.replaceable]


# --- what a UNet is shown beside its latents -----------------------------------------------------


def channels_of(unet: Mapping[str, Any]) -> tuple[int, int]:
    """The channels that a UNet takes, and those of the latents that it predicts, by its config."""
    takes, gives = (int(unet.get(name, 4)) for name in ("in_channels", "out_channels"))
    return takes, gives


def is_shown_masks(unet: Mapping[str, Any]) -> bool:
    """Whether it is shown a mask and a masked picture, as UNets for inpainting are."""
    takes, gives = channels_of(unet)
    return takes == 2 * gives + 1


def edits_pictures(unet: Mapping[str, Any]) -> bool:
    """Whether it is shown a picture, as InstructPix2Pix's UNets are."""
    takes, gives = channels_of(unet)
    return takes == 2 * gives


# --- checks --------------------------------------------------------------------------------------


def config_misfit(name: str, config: dict[str, Any]) -> str | None:
    """What is wrong in a component's config, or None."""
    model = component(name).config
    try:
        if model is not None:
            model.model_validate(config)
    except ValidationError as error:
        return first_refusal(error)
    return None


def index_misfit(index: dict[str, Any]) -> str | None:
    """What is wrong in a `model_index.json`, which gives each component's library and class."""
    if index.get("force_zeros_for_empty_prompt") not in (None, True, False):
        return "force_zeros_for_empty_prompt: give true or false"
    for row in COMPONENTS:
        value = index.get(row.name)
        if value in (None, [None, None]) or (  # the checkpoint leaves it out
            isinstance(value, list)
            and len(value) == 2
            and all(isinstance(part, str) for part in value)
        ):
            continue
        return f'{row.name}: give a library and a class, as ["diffusers", "AutoencoderKL"]'
    return None
