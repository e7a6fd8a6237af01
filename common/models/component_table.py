"""What the stages read of a component's config, checked before anything is built by it."""

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from common.errors import first_refusal

Count = Annotated[int, Field(ge=1, le=1_000_000)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Channels = Annotated[list[Count], Field(min_length=1, max_length=16)]


class _Config(BaseModel):
    model_config = ConfigDict(strict=True)  # a number is no text


class _UNetConfig(_Config):
    sample_size: Count
    in_channels: Count
    block_out_channels: Channels
    cross_attention_dim: Count
    time_cond_proj_dim: Count | None = None
    addition_embed_type: str | None = None
    addition_time_embed_dim: Count | None = None
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


class _VaeConfig(_Config):
    block_out_channels: Channels
    latent_channels: Count
    sample_size: Count | Annotated[list[Count], Field(min_length=1)] = 32
    force_upcast: bool = True
    scaling_factor: Number = 0.18215
    latents_mean: list[Number] | None = None
    latents_std: list[Number] | None = None

    @model_validator(mode="after")
    def _one_statistic_for_each_channel(self) -> Self:
        for values in (self.latents_mean, self.latents_std):
            if values is not None and len(values) != self.latent_channels:
                raise ValueError("latents_mean and latents_std need a number for each channel")
        return self


class _SchedulerConfig(_Config):
    class_name: str = Field(alias="_class_name")
    num_train_timesteps: Count = 1000


class _TextEncoderConfig(_Config):
    num_hidden_layers: Count


_MODELS: dict[str, type[BaseModel]] = {
    "unet": _UNetConfig,
    "vae": _VaeConfig,
    "scheduler": _SchedulerConfig,
    "text_encoder": _TextEncoderConfig,
    "text_encoder_2": _TextEncoderConfig,
}

# What a pipeline of Stable Diffusion is made of.
COMPONENTS = (*_MODELS, "tokenizer", "tokenizer_2", "safety_checker", "feature_extractor",
              "image_encoder")  # fmt: skip


def config_misfit(component: str, config: dict[str, Any]) -> str | None:
    """What is wrong in a component's config, or None."""
    model = _MODELS.get(component)
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
    for name in COMPONENTS:
        value = index.get(name)
        if value in (None, [None, None]) or (  # the checkpoint leaves it out
            isinstance(value, list)
            and len(value) == 2
            and all(isinstance(part, str) for part in value)
        ):
            continue
        return f'{name}: give a library and a class, as ["diffusers", "AutoencoderKL"]'
    return None
