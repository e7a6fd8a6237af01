"""Write a checkpoint in the original single-file layout, the one that most sites distribute.

The names are those of the original code (`model.diffusion_model.`, `first_stage_model.`,
`conditioner.embedders.` or `cond_stage_model.`), by the same correspondence as diffusers'
`scripts/convert_diffusers_to_original_sdxl.py`.
"""

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]


def save_original(folder: Path, file: Path) -> Path:
    """Write a diffusers folder's weights into one file."""
    tensors = {
        f"model.diffusion_model.{name}": tensor for name, tensor in original_unet(folder).items()
    }
    vae = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    tensors |= {f"first_stage_model.{name}": tensor for name, tensor in _vae(vae).items()}
    first = load_file(folder / "text_encoder" / "model.safetensors")
    second = folder / "text_encoder_2" / "model.safetensors"
    prefix = "conditioner.embedders.0" if second.exists() else "cond_stage_model"
    for name, tensor in first.items():
        tensors[f"{prefix}.transformer.text_model.{name.removeprefix('text_model.')}"] = tensor
    if second.exists():
        second_tensors = open_clip(load_file(second))
        tensors |= {
            f"conditioner.embedders.1.model.{name}": t for name, t in second_tensors.items()
        }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    return file


def original_unet(folder: Path) -> Tensors:
    """The UNet of a diffusers folder with one layer per block, under its original names."""
    tensors = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    blocks = _renamed_blocks(tensors)
    resnet = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "time_emb_proj": "emb_layers.1",
        "conv_shortcut": "skip_connection",
    }
    single = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    result = {}
    for name, tensor in tensors.items():
        stem, kind = name.rsplit(".", 1)
        if stem in single:
            result[f"{single[stem]}.{kind}"] = tensor
            continue
        block = next(block for block in blocks if name.startswith(f"{block}."))
        rest = name.removeprefix(f"{block}.")
        if ".resnets." in block:
            first, _, last = rest.partition(".")
            rest = f"{resnet[first]}.{last}"
        elif ".downsamplers." in block:
            rest = rest.replace("conv.", "op.")
        result[f"{blocks[block]}.{rest}"] = tensor
    return result


def _renamed_blocks(names: Iterable[str]) -> dict[str, str]:
    pattern = re.compile(
        r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)"
    )
    found = [match for match in map(pattern.match, names) if match]
    with_attention = {(m[1], m[2]) for m in found if m[3] == "attentions"}
    layers = {"down": 1, "up": 2}  # with layers_per_block=1
    blocks = {
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    for match in found:
        way, i, kind, j = match[1], int(match[2]), match[3], int(match[4])
        inner = {"resnets": 0, "downsamplers": 0, "attentions": 1}.get(
            kind, 2 if (way, match[2]) in with_attention else 1
        )
        if way == "down":
            number = 1 + 2 * i + (layers["down"] if kind == "downsamplers" else j)
            blocks[match[0]] = f"input_blocks.{number}.{inner}"
        else:
            number = 2 * i + (layers["up"] - 1 if kind == "upsamplers" else j)
            blocks[match[0]] = f"output_blocks.{number}.{inner}"
    return blocks


def _vae(tensors: Tensors) -> Tensors:
    ups = 1 + max(int(m[1]) for m in (re.search(r"up_blocks\.(\d+)", n) for n in tensors) if m)
    result = {}
    for name, tensor in tensors.items():
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        new = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", new)
        new = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", new)
        new = re.sub(
            r"up_blocks\.(\d)\.(resnets|upsamplers\.0)",
            lambda m: f"up.{ups - 1 - int(m[1])}.{'block' if m[2] == 'resnets' else 'upsample'}",
            new,
        )
        new = new.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        if "mid_block.attentions.0" in new:
            new = new.replace("mid_block.attentions.0", "mid.attn_1")
            for now, then in (
                *(("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v")),
                ("to_out.0", "proj_out"),
            ):
                new = new.replace(f".{now}.", f".{then}.")
            if tensor.ndim == 2:
                tensor = tensor[:, :, None, None]
        result[new] = tensor
    return result


def open_clip(tensors: Tensors) -> Tensors:
    """A text encoder in OpenCLIP's names, from transformers' with `text_model.`."""
    names = {
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.final_layer_norm.weight": "ln_final.weight",
        "text_model.final_layer_norm.bias": "ln_final.bias",
    }
    parts = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc"} | {
        "mlp.fc2": "mlp.c_proj",
        "self_attn.out_proj": "attn.out_proj",
    }
    result = {"text_projection": tensors["text_projection.weight"].T}
    for name, tensor in tensors.items():
        layer = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if name in names:
            result[names[name]] = tensor
        elif layer and layer[2] in parts:
            result[f"transformer.resblocks.{layer[1]}.{parts[layer[2]]}.{layer[3]}"] = tensor
        elif layer and layer[2] == "self_attn.q_proj":
            together = [tensors[name.replace("q_proj", f"{x}_proj")] for x in "qkv"]
            result[f"transformer.resblocks.{layer[1]}.attn.in_proj_{layer[3]}"] = torch.cat(
                together
            )
    return result
