"""The names that LoRA files have for modules; tests/models/test_lora.py reads whole files."""

from pathlib import Path

import pytest

from common.models.lora_names import (
    component_of,
    module_of,
    names_in_files,
    split_name,
)
from common.models.original_names import original_unet_name
from tests.models.test_original_names import unets


def test_no_name_stands_for_two_modules(tmp_path: Path) -> None:
    for unet in unets(tmp_path):
        modules = [name.removesuffix(".weight") for name in unet.state_dict()]
        modules = [name for name in modules if not name.endswith(".bias")]
        names = names_in_files("unet", modules, unet.config)
        for module in modules:
            original = original_unet_name(module, unet.config)
            for name in (
                *(f"unet.{module}", module, f"lora_unet_{module.replace('.', '_')}"),
                *(f"diffusion_model.{original}", f"lora_unet_{original}".replace(".", "_")),
                f"base_model.model.{module}",
            ):
                assert module_of(name, names) == module, name


@pytest.mark.parametrize(
    ("name", "module", "piece"),
    [
        ("lora_unet_x.lora_down.weight", "lora_unet_x", "down"),
        ("unet.x.to_q.lora_B.default.weight", "unet.x.to_q", "up"),
        ("unet.x.to_q.lora_B.a-style_2.weight", "unet.x.to_q", "up"),
        ("unet.x.to_q.lora.up.weight", "unet.x.to_q", "up"),
        ("unet.x.processor.to_q_lora.down.weight", "unet.x.processor.to_q_lora", "down"),
        ("text_encoder.q.lora_linear_layer.down.weight", "text_encoder.q", "down"),
        ("unet.x.lora_magnitude_vector.default.weight", "unet.x", "magnitude"),
        ("unet.x.lora_magnitude_vector", "unet.x", "magnitude"),
        ("lora_unet_x.hada_w1_a", "lora_unet_x", "hada_w1_a"),
        ("unet.x.lora.alpha", "unet.x", "alpha"),
        ("unet.x.lora_B.bias", "unet.x", "up_bias"),
    ],
)
def test_a_tensors_name_is_a_modules_and_a_pieces(name: str, module: str, piece: str) -> None:
    assert split_name(name) == (module, piece)


@pytest.mark.parametrize("name", ["x.weight", "unet.x.down.weight", "x.lora_down", "lora_A.weight"])
def test_another_tensor_is_none(name: str) -> None:
    assert split_name(name) is None


@pytest.mark.parametrize(
    ("name", "component"),
    [
        ("lora_te_text_model_x", "text_encoder"),
        ("lora_te1_x", "text_encoder"),
        ("lora_te2_x", "text_encoder_2"),
        ("text_encoder_2.x", "text_encoder_2"),
        ("text_encoder.x", "text_encoder"),
        ("base_model.model.text_model.x", "text_encoder"),
        ("base_model.model.unet.down_blocks.0", "unet"),
        ("clip_g.text_model.x", "text_encoder_2"),
        ("bundle_emb.x.clip_l", None),
        ("transformer.x", None),
    ],
)
def test_the_component_is_told_by_the_beginning(name: str, component: str | None) -> None:
    assert component_of(name) == component
