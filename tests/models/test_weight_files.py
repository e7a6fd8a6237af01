"""Weights of a UNet or a VAE from files as tools write them; each equals the model's own."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from common.errors import BadInputFileError
from common.models.find import find_weights_file, open_checkpoint
from common.models.original_names import (
    earlier_vae_name,
    original_unet_name,
    original_vae_name,
)
from common.models.weights import load_model
from common.runs.generation import RunSettings
from tests.refusals import refusal
from tests.tiny_checkpoints import save_sd, save_sdxl

Tensors = dict[str, torch.Tensor]


def own_name(module: str, _: Any) -> str:
    return module


@dataclass(frozen=True)
class Layout:
    """How a file names and holds a model's weights."""

    title: str
    component: str
    prefix: str
    naming: Callable[[str, Any], str | None]
    change: Callable[[Tensors], Tensors] = lambda tensors: tensors
    tolerance: float = 0.0  # relative, where the file holds less than float32


def as_convolutions(tensors: Tensors) -> Tensors:
    """Linear layers of attention as convolutions of size 1, as LDM's VAEs have them."""
    return {
        name: t[:, :, None, None] if "attn_1" in name and t.ndim == 2 else t
        for name, t in tensors.items()
    }


def in_8_bits(tensors: Tensors) -> Tensors:
    """ComfyUI's float8 with a scale for each weight."""
    made: Tensors = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for name, tensor in tensors.items():
        if tensor.ndim < 2:
            made[name] = tensor
            continue
        scale = tensor.abs().max() / 448
        made[name] = (tensor / scale).to(torch.float8_e4m3fn)
        made[f"{name.removesuffix('.weight')}.scale_weight"] = scale
    return made


def plain_8_bits(tensors: Tensors) -> Tensors:
    return {
        name: t.to(torch.float8_e4m3fn) if t.ndim > 1 else t.half() for name, t in tensors.items()
    }


LAYOUTS = (
    Layout("diffusers' names", "unet", "", own_name),
    Layout("diffusers' names with `unet.`", "unet", "unet.", own_name),
    Layout("LDM, `model.diffusion_model.`", "unet", "model.diffusion_model.", original_unet_name),
    Layout("ComfyUI, `diffusion_model.`", "unet", "diffusion_model.", original_unet_name),
    Layout("LDM without a prefix", "unet", "", original_unet_name),
    Layout("float8 with scales", "unet", "model.diffusion_model.", original_unet_name,
           in_8_bits, 0.1),
    Layout("float8 without scales", "unet", "", own_name, plain_8_bits, 0.1),
    Layout("diffusers' names", "vae", "", own_name),
    Layout("diffusers' names of before 0.15", "vae", "", earlier_vae_name),
    Layout("diffusers' names with `vae.`", "vae", "vae.", own_name),
    Layout("LDM, `first_stage_model.`", "vae", "first_stage_model.", original_vae_name,
           as_convolutions),
    Layout("LDM with `vae.`", "vae", "vae.", original_vae_name),
    Layout("LDM without a prefix, as sdxl_vae.safetensors", "vae", "", original_vae_name,
           as_convolutions),
)  # fmt: skip


@pytest.fixture(scope="module", params=["SDXL", "SD"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    save = {"SDXL": save_sdxl, "SD": save_sd}[request.param]
    return save(tmp_path_factory.mktemp("tiny") / request.param)


def own_weights(model: Path, component: str) -> tuple[Tensors, Any]:
    """A component's weights by diffusers, and its config."""
    kind = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[component]
    module = kind.from_pretrained(model / component)
    return {name: t.detach() for name, t in module.state_dict().items()}, module.config


def make_file(model: Path, layout: Layout, path: Path) -> tuple[Path, Tensors]:
    """A file in a layout, and the weights that it holds."""
    weights, config = own_weights(model, layout.component)
    named = {}
    for name, tensor in weights.items():
        module, _, kind = name.rpartition(".")
        named[f"{layout.prefix}{layout.naming(module, config)}.{kind}"] = tensor
    tensors = {name: t.clone().contiguous() for name, t in layout.change(named).items()}
    save_file(tensors, path)
    return path, weights


def load(model: Path, component: str, file: Path) -> Tensors:
    settings = RunSettings.model_validate({"model_id": str(model), component: str(file)})
    checkpoint = open_checkpoint(settings, [component])
    return dict(load_model(checkpoint, component, torch.float32)[1])


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.component}-{layout.title}")
def test_every_layout_gives_the_models_own_weights(
    model: Path, tmp_path: Path, layout: Layout, capsys: pytest.CaptureFixture[str]
) -> None:
    file, expected = make_file(model, layout, tmp_path / "file.safetensors")
    capsys.readouterr()
    found = load(model, layout.component, file)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if layout.tolerance:
            atol = layout.tolerance * tensor.abs().max().item()
            torch.testing.assert_close(found[name], tensor, rtol=layout.tolerance, atol=atol)
        else:
            assert torch.equal(found[name], tensor), name
    assert capsys.readouterr().err == ""


def test_scales_are_multiplied_out(model: Path, tmp_path: Path) -> None:
    """Without them float8's weights would be some hundred times as large."""
    (layout,) = (each for each in LAYOUTS if each.title == "float8 with scales")
    file, _ = make_file(model, layout, tmp_path / "file.safetensors")
    stored = load_file(file)
    name = "model.diffusion_model.input_blocks.0.0"
    exact = stored[f"{name}.weight"].float() * stored[f"{name}.scale_weight"]
    assert torch.equal(load(model, "unet", file)["conv_in.weight"], exact)


def test_a_decoder_alone_is_all_that_decoding_needs(model: Path, tmp_path: Path) -> None:
    for title in ("diffusers' names", "LDM without a prefix, as sdxl_vae.safetensors"):
        (layout,) = (each for each in LAYOUTS if (each.title, each.component) == (title, "vae"))
        file, expected = make_file(model, layout, tmp_path / "file.safetensors")
        tensors = load_file(file)
        decoding = {
            n: t for n, t in tensors.items() if not n.startswith(("encoder.", "quant_conv."))
        }
        save_file(decoding, file)
        found = load(model, "vae", file)
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            if not name.startswith(("encoder.", "quant_conv.")):
                assert torch.equal(tensor, expected[name])
        # Half an encoder is a damaged file.
        save_file(decoding | {"encoder.conv_in.weight": tensors["encoder.conv_in.weight"]}, file)
        with refusal(BadInputFileError, "lacks", "encoder.conv_out.weight"):
            load(model, "vae", file)


def test_what_belongs_to_no_weight_is_named(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A training's leftovers; what is beside the UNet in a whole checkpoint is others' business."""
    file, expected = make_file(model, LAYOUTS[7], tmp_path / "vae.safetensors")
    save_file(load_file(file) | {"loss.logvar": torch.zeros(1)}, file)
    capsys.readouterr()
    assert load(model, "vae", file).keys() == expected.keys()
    assert capsys.readouterr().err == f"warning: {file}: not used: loss.logvar\n"
    file, _ = make_file(model, LAYOUTS[2], tmp_path / "whole.safetensors")
    beside = {"first_stage_model.x": torch.zeros(1), "v_pred": torch.zeros(0)}
    save_file(load_file(file) | beside, file)
    capsys.readouterr()
    load(model, "unet", file)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("layout", LAYOUTS[:5] + LAYOUTS[7:], ids=lambda layout: layout.title)
@pytest.mark.parametrize("way", ["dropped", "renamed", "transposed", "added", "retyped"])
def test_one_tensor_that_is_not_as_it_was_is_named(
    model: Path, tmp_path: Path, layout: Layout, way: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file, _ = make_file(model, layout, tmp_path / "file.safetensors")
    tensors = load_file(file)
    wide = sorted(n for n, t in tensors.items() if t.ndim > 1 and t.shape[0] != t.shape[1])
    name = wide[sum(map(ord, layout.title + way)) % len(wide)]
    told, tensor = name, tensors.pop(name)
    if way == "renamed":
        tensors[f"{name}x"] = tensor
    elif way == "transposed":
        tensors[name] = tensor.transpose(0, 1).contiguous()
    elif way == "added":
        told = f"{name.rpartition('.')[0]}.other"
        tensors |= {name: tensor, told: tensor.clone()}
    elif way == "retyped":
        tensors[name] = tensor.to(torch.int8)
    save_file(tensors, file)
    capsys.readouterr()
    try:
        load(model, layout.component, file)
    except BadInputFileError as error:
        assert told in str(error), error
        return
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("component", ["unet", "vae"])
def test_a_file_of_something_else_is_told_as_what_it_is(
    model: Path, tmp_path: Path, component: str
) -> None:
    file = tmp_path / "file.safetensors"
    for tensors, words in (
        ({"lora_unet_x.lora_down.weight": torch.zeros(2, 2)}, "holds none of the weights of a"),
        ({"x": torch.zeros(1)}, "but x: choose another file"),
    ):
        save_file(tensors, file)
        with refusal(BadInputFileError, str(file), words):
            load(model, component, file)
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    with refusal(BadInputFileError, f"{file} is a Git LFS pointer", "git lfs pull"):
        load(model, component, file)


def test_shards_with_an_index_win_over_a_whole_file_beside_them(
    model: Path, tmp_path: Path
) -> None:
    """As diffusers picks."""
    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    unet.save_pretrained(tmp_path / "unet", max_shard_size="100KB")
    whole = {name: torch.zeros_like(t) for name, t in unet.state_dict().items()}
    save_file(whole, tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    expected = UNet2DConditionModel.from_pretrained(tmp_path / "unet").state_dict()
    found = load(model, "unet", tmp_path / "unet")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_tiny_autoencoder_is_a_vae(model: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
    )
    tiny.save_pretrained(tmp_path / "taesd")
    file = tmp_path / "taesd" / "diffusion_pytorch_model.safetensors"
    for source in (tmp_path / "taesd", file):  # whose config stands beside it
        found = load(model, "vae", source)
        assert all(torch.equal(found[name], tensor) for name, tensor in tiny.state_dict().items())
    # Without its config it could be any; by its own names it begins with a clamp.
    own = {
        f"{int(n.split('.')[2]) + 1}.{n.split('.', 3)[3]}": t
        for n, t in load_file(file).items()
        if n.startswith("decoder.")
    }
    for tensors in (load_file(file), own, {f"taesd_decoder.{n}": t for n, t in own.items()}):
        save_file(tensors, tmp_path / "taesd.safetensors")
        with refusal(BadInputFileError, "it is a TAESD; name its folder in diffusers' layout"):
            load(model, "vae", tmp_path / "taesd.safetensors")


def test_endings_in_any_letter_case(model: Path, tmp_path: Path) -> None:
    file, expected = make_file(model, LAYOUTS[0], tmp_path / "Unet.SafeTensors")
    found = load(model, "unet", file)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    settings = RunSettings(model_id=str(file), single_file_config=str(model))
    assert open_checkpoint(settings, ["unet"]).source("unet").file == file
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert find_weights_file("Unet.SafeTensors", "--lora", "FILE").is_file()
