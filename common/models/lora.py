"""LoRA files, fused into models on the CPU by diffusers and peft before anything is sharded."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common.declared import EMBEDDINGS
from common.errors import BadInputFileError, in_one_line
from common.models.checkpoint import hash_large_file
from common.models.component_table import COMPONENTS, loaded_for
from common.models.find import find_weights_file
from common.models.model_settings import LoraFile


def lora_settings(loras: Sequence[LoraFile], components: Sequence[str]) -> list[dict[str, Any]]:
    """What of the LoRAs determines the given components: content and scale, in their order."""
    return [
        {"sha256": hash_large_file(find_lora(lora)), "scale": lora.scale}
        for lora in loras
        if parts_of(lora) & set(components)
    ]


def find_lora(lora: LoraFile) -> Path:
    """The file of a LoRA. Raises `BadInputFileError` where there is none."""
    return find_weights_file(lora.file, "--lora", "FILE or FILE:SCALE")


def parts_of(lora: LoraFile) -> set[str]:
    """The components that a LoRA file changes.

    Raises:
        BadInputFileError: there is no such safetensors file, or it changes none of them.
    """
    from safetensors import SafetensorError, safe_open

    path = find_lora(lora)
    try:
        with safe_open(path, "np") as file:
            keys = list(file.keys())
    except (OSError, SafetensorError) as error:
        raise BadInputFileError(f"--lora {path} is damaged ({error}): get it again") from None
    parts = {
        row.name for row in COMPONENTS if any(key.startswith(row.lora_prefixes) for key in keys)
    }
    if not parts:
        raise BadInputFileError(
            f"--lora {path} holds no LoRA layers for a UNet or text encoder in diffusers' or "
            "kohya's layout: choose another file"
        )
    return parts


def fuse_into_unet(unet: Any, loras: Sequence[LoraFile]) -> None:
    """Add the LoRAs to a diffusers UNet's own weights."""
    for lora in loras:
        if "unet" not in parts_of(lora):
            continue
        with _fusing(lora):
            state_dict, alphas, metadata = _read(lora, unet.config)
            _loader().load_lora_into_unet(state_dict, alphas, unet, metadata=metadata)
            unet.fuse_lora(lora_scale=lora.scale)
            unet.unload_lora()


def fuse_into_text_encoders(pipeline: Any, loras: Sequence[LoraFile], unet_config: Any) -> None:
    """Add the LoRAs to the weights of a pipeline's text encoders.

    Args:
        unet_config: the UNet's config, by which diffusers reads some layouts.
    """
    from diffusers.configuration_utils import FrozenDict
    from diffusers.loaders.lora_base import (
        _remove_text_encoder_monkey_patch,
        fuse_text_encoder_lora,
    )

    for lora in loras:
        for name in sorted(parts_of(lora) & set(loaded_for(EMBEDDINGS))):
            text_encoder = getattr(pipeline, name, None)
            if text_encoder is None:
                raise BadInputFileError(
                    f"--lora {lora.file} changes {name}, which this checkpoint does not have: "
                    "choose a LoRA for this family"
                )
            with _fusing(lora):
                state_dict, alphas, metadata = _read(lora, FrozenDict(unet_config))
                _loader().load_lora_into_text_encoder(
                    state_dict, alphas, text_encoder, prefix=name, metadata=metadata
                )
                fuse_text_encoder_lora(text_encoder, lora.scale)
                _remove_text_encoder_monkey_patch(text_encoder)


def _loader() -> Any:
    """diffusers' loader, which serves one text encoder as well as two."""
    from diffusers.loaders import StableDiffusionXLLoraLoaderMixin

    return StableDiffusionXLLoraLoaderMixin


def _read(lora: LoraFile, unet_config: Any) -> tuple[Any, Any, Any]:
    state_dict, alphas, metadata = _loader().lora_state_dict(
        str(find_lora(lora)),
        unet_config=unet_config,
        use_safetensors=True,
        local_files_only=True,
        return_lora_metadata=True,
    )
    return state_dict, alphas, metadata


@contextlib.contextmanager
def _fusing(lora: LoraFile) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        reason = in_one_line(error)
        raise BadInputFileError(
            f"--lora {lora.file} does not fit this checkpoint ({type(error).__name__}: {reason}): "
            "choose a LoRA for this family"
        ) from error
