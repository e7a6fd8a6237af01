"""Original names are those that diffusers' own converters take."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)

from common.models.original_names import (
    earlier_vae_name,
    original_unet_name,
    original_vae_name,
)
from tests.conftest import DEMO
from tests.tiny_checkpoints import save_sd

# Of SDXL's kind, with more levels and layers than the tiny checkpoints.
SDXL_UNET: dict[str, Any] = dict(
    block_out_channels=(8, 16, 16),
    norm_num_groups=4,
    layers_per_block=2,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=(1, 2, 2),
    attention_head_dim=4,
    cross_attention_dim=8,
    addition_embed_type="text_time",
    addition_time_embed_dim=4,
    projection_class_embeddings_input_dim=32,
    use_linear_projection=True,
)


def unets(folder: Path) -> list[Any]:
    save_sd(folder)
    return [
        UNet2DConditionModel.from_pretrained(DEMO / "unet"),
        UNet2DConditionModel.from_pretrained(folder / "unet"),
        UNet2DConditionModel(**SDXL_UNET),
    ]


def vaes(folder: Path) -> list[Any]:
    return [
        AutoencoderKL.from_pretrained(DEMO / "vae"),
        AutoencoderKL(
            block_out_channels=(8, 16, 16),
            norm_num_groups=4,
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
        ),
    ]


@pytest.mark.parametrize(
    ("models", "prefix", "original", "convert"),
    [
        (unets, "model.diffusion_model.", original_unet_name, convert_ldm_unet_checkpoint),
        (vaes, "first_stage_model.", original_vae_name, convert_ldm_vae_checkpoint),
    ],
)
def test_original_names_are_those_that_diffusers_converts_from(
    tmp_path: Path,
    models: Callable[[Path], list[Any]],
    prefix: str,
    original: Callable[[str, Any], str | None],
    convert: Callable[[Any, Any], dict[str, torch.Tensor]],
) -> None:
    for model in models(tmp_path):
        state = model.state_dict()
        modules = {name.rpartition(".")[0] for name in state}
        originals = {module: original(module, model.config) for module in modules}
        assert len(set(originals.values())) == len(modules)
        as_original = {}
        for name in state:
            module, _, kind = name.rpartition(".")
            as_original[f"{prefix}{originals[module]}.{kind}"] = torch.tensor(
                [[ord(c)] for c in name]
            )
        converted = convert(as_original, dict(model.config))
        assert converted.keys() == state.keys()
        for name, tensor in converted.items():
            assert "".join(map(chr, tensor.flatten().tolist())) == name


def test_earlier_names_are_those_that_diffusers_still_reads(tmp_path: Path) -> None:
    for vae in vaes(tmp_path):
        renamed = {}
        for name, tensor in vae.state_dict().items():
            module, _, kind = name.rpartition(".")
            renamed[f"{earlier_vae_name(module, vae.config)}.{kind}"] = tensor
        assert renamed.keys() != vae.state_dict().keys()
        vae.save_config(tmp_path / "vae")
        torch.save(renamed, tmp_path / "vae" / "diffusion_pytorch_model.bin")
        again = AutoencoderKL.from_pretrained(tmp_path / "vae", use_safetensors=False)
        for name, tensor in again.state_dict().items():
            assert torch.equal(tensor, vae.state_dict()[name]), name


def test_what_the_original_code_does_not_have_has_no_name() -> None:
    assert original_unet_name("class_embedding", {"layers_per_block": 2}) is None
    assert original_vae_name("decoder.x", {"block_out_channels": [8]}) is None
