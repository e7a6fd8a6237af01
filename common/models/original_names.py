"""What modules of diffusers' models are called in the original code (LDM, SGM), and were before.

Source: diffusers' `single_file_utils`, which convert the other way; a test compares both.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Stored:
    """A weight as a file holds it."""

    name: str  # of the tensor
    third: int | None = None  # which of the three that the tensor holds one under the other
    transposed: bool = False


def original_unet_name(module: str, config: Mapping[str, Any]) -> str | None:
    """A UNet's module under its original name; None where that code has none.

    Args:
        config: the UNet's.
    """
    if module in _ORIGINAL:
        return _ORIGINAL[module]
    each = int(config["layers_per_block"]) + 1
    block = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", module)
    middle = re.fullmatch(r"mid_block\.(\w+)\.(\d+)\.(.+)", module)
    if middle is not None:
        kind, number, inner = middle[1], int(middle[2]), middle[3]
        place = 2 * number if kind == "resnets" else 2 * number + 1
        return f"middle_block.{place}.{_original_inner(kind, inner)}"
    if block is None:
        return None
    way, level, kind, number, inner = block[1], int(block[2]), block[3], int(block[4]), block[5]
    if kind == "downsamplers":
        return f"input_blocks.{(level + 1) * each}.0.op"
    if kind == "upsamplers":
        has_attention = "CrossAttn" in config["up_block_types"][level]
        return f"output_blocks.{(level + 1) * each - 1}.{2 if has_attention else 1}.conv"
    side, first = ("input", 1) if way == "down" else ("output", 0)
    place = 0 if kind == "resnets" else 1
    return f"{side}_blocks.{first + level * each + number}.{place}.{_original_inner(kind, inner)}"


_ORIGINAL = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_ORIGINAL_IN_RESNETS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def _original_inner(kind: str, inner: str) -> str:
    return _ORIGINAL_IN_RESNETS.get(inner, inner) if kind == "resnets" else inner


def original_vae_name(module: str, config: Mapping[str, Any]) -> str | None:
    """An `AutoencoderKL`'s module under its original name; None where that code has none.

    Args:
        config: the VAE's.
    """
    if module in ("quant_conv", "post_quant_conv"):
        return module
    side, _, inner = module.partition(".")
    if inner in ("conv_in", "conv_out", "conv_norm_out"):
        return f"{side}.{inner.replace('conv_norm_out', 'norm_out')}"
    if middle := re.fullmatch(r"mid_block\.resnets\.(\d)\.(\w+)", inner):
        return f"{side}.mid.block_{int(middle[1]) + 1}.{_vae_resnet(middle[2])}"
    if middle := re.fullmatch(r"mid_block\.attentions\.0\.(.+)", inner):
        return f"{side}.mid.attn_1.{_ORIGINAL_IN_VAE_ATTENTION.get(middle[1], middle[1])}"
    block = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(\w+)", inner)
    if block is None:
        return None
    way, level, kind, number, last = block[1], int(block[2]), block[3], block[4], block[5]
    if way == "up":
        level = len(config["block_out_channels"]) - 1 - level
    if kind == "resnets":
        return f"{side}.{way}.{level}.block.{number}.{_vae_resnet(last)}"
    return f"{side}.{way}.{level}.{way}sample.{last}"


_ORIGINAL_IN_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
# diffusers' own names of attention in VAEs before version 0.15.
_BEFORE_IN_VAE_ATTENTION = {
    "to_q": "query",
    "to_k": "key",
    "to_v": "value",
    "to_out.0": "proj_attn",
}


def _vae_resnet(name: str) -> str:
    return name.replace("conv_shortcut", "nin_shortcut")


def earlier_vae_name(module: str, config: Mapping[str, Any]) -> str | None:
    """An `AutoencoderKL`'s module as diffusers called it before version 0.15."""
    start, attention, last = module.partition("mid_block.attentions.0.")
    return start + attention + _BEFORE_IN_VAE_ATTENTION.get(last, last) if attention else module


_OPEN_CLIP = {
    "text_model.embeddings.token_embedding.weight": Stored("token_embedding.weight"),
    "text_model.embeddings.position_embedding.weight": Stored("positional_embedding"),
    "text_model.final_layer_norm.weight": Stored("ln_final.weight"),
    "text_model.final_layer_norm.bias": Stored("ln_final.bias"),
    "text_projection.weight": Stored("text_projection", transposed=True),
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def open_clip_name(weight: str) -> Stored | None:
    """A text encoder's weight in OpenCLIP's code; None where that has none.

    Args:
        weight: by transformers' name, with `text_model.` or without.
    """
    if not weight.startswith(("text_model.", "text_projection.")):
        weight = f"text_model.{weight}"
    if weight in _OPEN_CLIP:
        return _OPEN_CLIP[weight]
    layer = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", weight)
    if layer is None:
        return None
    block, module, kind = f"transformer.resblocks.{layer[1]}", layer[2], layer[3]
    if together := re.fullmatch(r"self_attn\.([qkv])_proj", module):
        return Stored(f"{block}.attn.in_proj_{kind}", third="qkv".index(together[1]))
    inner = _OPEN_CLIP_LAYER.get(module)
    return None if inner is None else Stored(f"{block}.{inner}.{kind}")
