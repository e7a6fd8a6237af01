"""LoRAs add scale · B·A to the weights that they name, and count by what they hold."""

import hashlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextModel

from common.declared import EMBEDDINGS, LATENTS
from common.errors import BadInputFileError
from common.models.component_table import loaded_for
from common.models.lora import fuse_into_text_encoders, fuse_into_unet, lora_settings, parts_of
from common.models.model_settings import LoraFile
from tests.refusals import call, refusal
from tests.tiny_checkpoints import save_sd

UNET_LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"

TEXT_LAYER = "text_model.encoder.layers.1.self_attn.q_proj"

RANK = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sd(tmp_path_factory.mktemp("tiny") / "sd")


def make_lora(file: Path, layers: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A LoRA of random matrices for weights, by their names. Returns B·A of each."""
    torch.manual_seed(3)
    tensors, products = {}, {}
    for name, weight in layers.items():
        a, b = torch.randn(RANK, weight.shape[1]), torch.randn(weight.shape[0], RANK)
        tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        products[name] = b @ a
    save_file(tensors, file)
    return products


def test_what_is_added_to_a_unet_and_a_text_encoder(model: Path, tmp_path: Path) -> None:
    """By the formula; all other weights stay, and nothing of peft is left in the modules."""
    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    encoder = CLIPTextModel.from_pretrained(model / "text_encoder")
    text_layer = next(n for n, _ in encoder.named_modules() if TEXT_LAYER.endswith(n) and n)
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in (unet, encoder)]
    file = tmp_path / "style.safetensors"
    products = make_lora(
        file,
        {
            f"unet.{UNET_LAYER}": before[0][f"{UNET_LAYER}.weight"],
            f"text_encoder.{TEXT_LAYER}": before[1][f"{text_layer}.weight"],
        },
    )
    loras = [LoraFile(file=str(file), scale=0.5), LoraFile(file=str(file), scale=-0.2)]
    fuse_into_unet(unet, loras)
    fuse_into_text_encoders(SimpleNamespace(text_encoder=encoder), loras, dict(unet.config))
    for module, old, layer, product in (
        (unet, before[0], UNET_LAYER, products[f"unet.{UNET_LAYER}"]),
        (encoder, before[1], text_layer, products[f"text_encoder.{TEXT_LAYER}"]),
    ):
        new = module.state_dict()
        assert new.keys() == old.keys()
        expected = old | {f"{layer}.weight": old[f"{layer}.weight"] + 0.3 * product}
        for name, tensor in new.items():
            assert torch.allclose(tensor, expected[name], atol=1e-6), name
        changed = {name for name in new if not torch.equal(new[name], old[name])}
        assert changed == {f"{layer}.weight"}


@pytest.mark.parametrize(
    ("key", "part"),
    [
        ("unet.mid_block.to_q.lora_A.weight", "unet"),
        ("lora_unet_mid_block.alpha", "unet"),
        ("text_encoder.layers.0.lora_A.weight", "text_encoder"),
        ("lora_te_text_model.alpha", "text_encoder"),
        ("lora_te1_text_model.alpha", "text_encoder"),
        ("text_encoder_2.layers.0.lora_A.weight", "text_encoder_2"),
        ("lora_te2_text_model.alpha", "text_encoder_2"),
    ],
)
def test_the_part_that_a_layer_changes(tmp_path: Path, key: str, part: str) -> None:
    file = tmp_path / "style.safetensors"
    save_file({key: torch.zeros(1), "other": torch.zeros(1)}, file)
    assert parts_of(LoraFile(file=str(file))) == {part}


def test_a_lora_counts_by_content_scale_and_what_it_changes(tmp_path: Path) -> None:
    unet, text = tmp_path / "unet.safetensors", tmp_path / "text.safetensors"
    save_file({"unet.a": torch.zeros(1)}, unet)
    save_file({"text_encoder.a": torch.zeros(1)}, text)
    loras = [
        LoraFile(file=f"{text}", scale=0.5),
        LoraFile(file=str(unet)),
        LoraFile(file=str(text)),
    ]
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (unet, text)]
    assert lora_settings(loras, loaded_for(LATENTS)) == [{"sha256": hashes[0], "scale": 1.0}]
    assert lora_settings(loras, loaded_for(EMBEDDINGS)) == [
        {"sha256": hashes[1], "scale": 0.5},
        {"sha256": hashes[1], "scale": 1.0},
    ]
    renamed = unet.rename(tmp_path / "renamed.safetensors")
    again = lora_settings([LoraFile(file=str(renamed))], loaded_for(LATENTS))
    assert again == lora_settings([LoraFile(file=str(renamed))], ["unet"])
    assert again[0]["sha256"] == hashes[0]


def test_a_lora_that_does_not_fit_is_one_sentence(model: Path, tmp_path: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    file = tmp_path / "wide.safetensors"
    make_lora(file, {f"unet.{UNET_LAYER}": torch.zeros(7, 9)})
    with pytest.raises(BadInputFileError) as caught:
        fuse_into_unet(unet, [LoraFile(file=str(file))])
    said = str(caught.value)
    assert said.startswith(f"--lora {file} does not fit this checkpoint") and "\n" not in said
    save_file({"weight": torch.zeros(1)}, file)
    with pytest.raises(BadInputFileError, match="holds no LoRA layers"):
        parts_of(LoraFile(file=str(file)))


def test_a_damaged_lora_names_the_mend(run_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "style.safetensors"
    file.write_bytes(b"none")
    for number in (1, 2):
        with refusal(BadInputFileError, f"--lora {file} is damaged", "get it again"):
            call(number, "--output_dir", run_dir, "--lora", file)


def test_a_lora_for_a_text_encoder_that_is_not_there(tmp_path: Path) -> None:
    model, file = save_sd(tmp_path / "sd"), tmp_path / "xl.safetensors"
    save_file({"lora_te2_text_model_encoder_layers_0.alpha": torch.zeros(1)}, file)
    with refusal(
        BadInputFileError, f"--lora {file} changes text_encoder_2", "choose a LoRA for this family"
    ):
        call(1, "--output_dir", tmp_path / "run", "--model_id", model, "--lora", file)
