"""LoRAs add what their methods are defined to add, to weights as their files have them."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from common.compute.kept import Kept
from common.declared import EMBEDDINGS, LATENTS
from common.errors import BadInputFileError
from common.models.checkpoint import Checkpoint
from common.models.component_table import loaded_for
from common.models.lora import lora_settings, parts_of, plan_fusion
from common.models.model_settings import LoraFile
from common.models.original_names import original_unet_name
from common.models.text_pipeline import open_text_pipeline
from common.models.weights import make_without_weights, read_model
from tests.in_process import Ours
from tests.models.lora_files import FORMATS, Format, MadeFile, make_file
from tests.refusals import call, refusal
from tests.tiny_checkpoints import save_sd, save_sdxl

Weights = dict[tuple[str, str], torch.Tensor]  # (component, parameter) → values
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


class Model:
    """A tiny checkpoint, its weights, and what they are with LoRAs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoint: Checkpoint = Ours(folder).checkpoint
        unet = UNet2DConditionModel.from_config(self.checkpoint.config("unet"))
        self.originals = {
            name: original_unet_name(name, unet.config) or "" for name, _ in unet.named_modules()
        }
        self.before = self.with_loras([], "float32")
        self.shapes = {
            (component, name.removesuffix(".weight")): tuple(weight.shape)
            for (component, name), weight in self.before.items()
        }

    def with_loras(self, loras: Sequence[LoraFile], dtype: str) -> Weights:
        """All weights, as the stages load them."""
        added = tuple(loras)
        found = {("unet", name): tensor for name, tensor in self.unet_with(added, dtype).items()}
        pipeline = open_text_pipeline(Kept(), self.checkpoint, dtype, added, ())
        for component in TEXT_ENCODERS:
            encoder = getattr(pipeline, component, None)
            if encoder is not None:
                found |= {(component, name): t.detach() for name, t in encoder.named_parameters()}
        return found

    def unet_with(self, loras: Sequence[LoraFile], dtype: str) -> dict[str, torch.Tensor]:
        module = make_without_weights(self.checkpoint, "unet", getattr(torch, dtype))
        fusion = plan_fusion("unet", module, self.checkpoint, loras)
        return dict(read_model(self.checkpoint, "unet", module, getattr(torch, dtype), fusion))

    def make(self, kind: Format, folder: Path, seed: int = 0) -> tuple[Path, MadeFile]:
        made = make_file(kind, self.shapes, self.originals, seed)
        file = folder / f"{seed}.safetensors"
        save_file(made.as_torch(), file, made.metadata)
        return file, made


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(save_sdxl(tmp_path_factory.mktemp("tiny") / "sdxl"))


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(save_sd(tmp_path_factory.mktemp("tiny") / "sd"))


def check(
    model: Model, found: Weights, added: Sequence[tuple[MadeFile, float]], dtype: str
) -> None:
    """All weights are by the formula in float64, rounded once."""
    changed = {key for made, _ in added for key in made.deltas}
    assert changed
    for key, before in model.before.items():
        expected = before.double().numpy()
        for made, scale in added:
            if key in made.deltas:
                expected = expected + scale * made.deltas[key](expected)
        actual = found[key].double().numpy()
        assert found[key].dtype == getattr(torch, dtype)
        if key not in changed and dtype == "float32":
            assert np.array_equal(actual, expected), key
        rounding = 0.0 if dtype == "float32" else 2.0**-8 * np.abs(expected) * 1.001
        assert (np.abs(actual - expected) <= rounding + 1e-5 * (1 + np.abs(expected))).all(), key


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.title)
def test_every_layout_adds_what_its_method_is_defined_to_add(
    sdxl: Model, tmp_path: Path, kind: Format, capsys: pytest.CaptureFixture[str]
) -> None:
    file, made = sdxl.make(kind, tmp_path)
    for dtype, scale in (("float32", 1.0), ("bfloat16", 0.5)):
        found = sdxl.with_loras([LoraFile(file=str(file), scale=scale)], dtype)
        check(sdxl, found, [(made, scale)], dtype)
    warnings = capsys.readouterr().err
    assert ("no lora_unet" in warnings) == (kind.title == "kohya LoRA without alphas"), warnings


@pytest.mark.parametrize("scale", [0.0, -0.5])
@pytest.mark.parametrize("title", ["kohya LoRA", "DoRA, a norm for each output", "(IA)³ of inputs"])
def test_no_strength_is_the_model_and_less_than_none_is_taken_away(
    sdxl: Model, tmp_path: Path, title: str, scale: float
) -> None:
    (kind,) = (kind for kind in FORMATS if kind.title == title)
    file, made = sdxl.make(kind, tmp_path)
    found = sdxl.with_loras([LoraFile(file=str(file), scale=scale)], "float32")
    check(sdxl, found, [(made, scale)], "float32")


@pytest.mark.parametrize("title", ["kohya LoRA", "DoRA, a norm for each input", "LoHa"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_at_once_are_added_one_after_the_other(
    sdxl: Model, tmp_path: Path, title: str, dtype: str
) -> None:
    (first,) = (kind for kind in FORMATS if kind.title == title)
    (second,) = (kind for kind in FORMATS if kind.title == "diffusers")
    (file, made), (other, more) = sdxl.make(first, tmp_path), sdxl.make(second, tmp_path, seed=1)
    loras = [LoraFile(file=str(file), scale=0.7), LoraFile(file=str(other), scale=-0.4)]
    check(sdxl, sdxl.with_loras(loras, dtype), [(made, 0.7), (more, -0.4)], dtype)


@pytest.mark.parametrize("title", ["kohya LoRA", "diffusers", "ComfyUI, `diffusion_model.`"])
def test_the_same_for_one_text_encoder(sd: Model, tmp_path: Path, title: str) -> None:
    """And projections that are convolutions of size 1."""
    (kind,) = (kind for kind in FORMATS if kind.title == title)
    file, made = sd.make(kind, tmp_path)
    tensors = {
        name.replace("lora_te1_", "lora_te_"): tensor
        for name, tensor in made.as_torch().items()
        if "text_encoder_2" not in name and "te2" not in name
    }
    save_file(tensors, file)
    made.deltas = {key: delta for key, delta in made.deltas.items() if key in sd.before}
    check(sd, sd.with_loras([LoraFile(file=str(file))], "float32"), [(made, 1.0)], "float32")


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
def test_a_weak_lora_is_kept_unless_the_weights_are_rounded_already(
    tmp_path: Path, stored: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """‖ΔW‖ / ‖W‖ = 0.001, computed in bfloat16."""
    folder = save_sdxl(tmp_path / "model")
    for name in ("unet/diffusion_pytorch_model", "text_encoder/model"):
        file = folder / f"{name}.safetensors"
        stored_tensors = {k: t.to(getattr(torch, stored)) for k, t in load_file(file).items()}
        save_file(stored_tensors, file)
    model = Model(folder)
    capsys.readouterr()
    tensors = {}
    generator = torch.Generator().manual_seed(0)
    for (component, name), weight in model.before.items():
        if not (name.endswith(("to_q.weight", "q_proj.weight")) and component != "text_encoder_2"):
            continue
        up, down = (torch.randn(n, 4, generator=generator) for n in weight.shape)
        factor = (0.001 * weight.norm() / (up @ down.T).norm()).item()
        path = f"{component}.{name.removesuffix('.weight')}"
        tensors |= {f"{path}.lora_up.weight": up * factor, f"{path}.lora_down.weight": down.T}
    save_file({k: t.contiguous() for k, t in tensors.items()}, tmp_path / "weak.safetensors")
    found = model.with_loras([LoraFile(file=str(tmp_path / "weak.safetensors"))], "bfloat16")
    moved = total = 0.0
    for (component, name), after in found.items():
        path = f"{component}.{name.removesuffix('.weight')}"
        if f"{path}.lora_up.weight" in tensors:
            delta = tensors[f"{path}.lora_up.weight"] @ tensors[f"{path}.lora_down.weight"]
            change = after.float() - model.before[component, name].bfloat16().float()
            moved += (change * delta).sum().item()
            total += delta.square().sum().item()
    said = capsys.readouterr().err
    if stored == "bfloat16":
        assert 0.4 < moved / total < 0.7
        assert said.count("rounded to bfloat16") == 2 and "take a checkpoint in float16" in said
    else:
        assert moved / total == pytest.approx(1, abs=0.08)
        assert "rounded" not in said


def test_settings_of_peft_scale_what_has_no_alpha(sdxl: Model, tmp_path: Path) -> None:
    """In the metadata that diffusers writes, and in the file that peft writes beside."""
    module = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    shape = sdxl.shapes["unet", module]
    up, down = torch.randn(shape[0], 4), torch.randn(4, shape[1])
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 6}
    more: dict[str, Any]
    for more, scaling in (
        ({}, 6 / 4),
        ({"use_rslora": True}, 6 / 2),
        ({"alpha_pattern": {"attn2.to_k": 8}}, 8 / 4),
    ):
        config = settings | more
        text = json.dumps({f"unet.{key}": value for key, value in config.items()})
        tensors = {f"unet.{module}.lora_A.weight": down, f"unet.{module}.lora_B.weight": up}
        save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": text})
        folder = tmp_path / "peft"
        folder.mkdir(exist_ok=True)
        beside = {f"base_model.model.{k.removeprefix('unet.')}": t for k, t in tensors.items()}
        save_file(beside, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(config))
        for file in (tmp_path / "a.safetensors", folder / "adapter_model.safetensors"):
            weights = sdxl.unet_with([LoraFile(file=str(file))], "float32")
            expected = sdxl.before["unet", f"{module}.weight"] + scaling * up @ down
            torch.testing.assert_close(weights[f"{module}.weight"], expected)


# --- what is not right, or not all ----------------------------------------------------------------


def test_what_fits_in_part_says_its_share(
    sdxl: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, made = sdxl.make(FORMATS[0], tmp_path)
    tensors = made.as_torch() | {
        "lora_unet_down_blocks_7_x.lora_down.weight": torch.zeros(2, 3),
        "lora_te2_x.alpha": torch.tensor(1.0),
        "bundle_emb.toy.clip_l": torch.zeros(2, 32),
        "betas": torch.zeros(3),
    }
    save_file(tensors, file)
    check(sdxl, sdxl.with_loras([LoraFile(file=str(file))], "float32"), [(made, 1.0)], "float32")
    said = capsys.readouterr().err
    assert (
        f"--lora {file}: 98% of it is used; not used: lora_unet_down_blocks_7_x.lora_down" in said
    )
    assert "not used: lora_te2_x.alpha" in said and "not used: betas" in said
    assert "textual inversions (toy), which are not used: save each as a file for --emb" in said


@pytest.mark.parametrize(
    ("metadata", "warned"),
    [
        ({"ss_base_model_version": "sd_v1"}, "trained for SD 1.x; this checkpoint is SDXL"),
        ({"modelspec.architecture": "flux-1-dev/lora"}, "trained for Flux; this checkpoint is SD"),
        ({"ss_base_model_version": "sdxl_base_v1-0"}, ""),
    ],
)
def test_a_file_that_says_another_family_is_warned_about(
    sdxl: Model,
    tmp_path: Path,
    metadata: dict[str, str],
    warned: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, made = sdxl.make(FORMATS[0], tmp_path)
    save_file(made.as_torch(), file, metadata)
    sdxl.with_loras([LoraFile(file=str(file))], "float32")
    said = capsys.readouterr().err
    assert warned in said if warned else said == ""


def test_nothing_that_fits_is_an_error(sdxl: Model, tmp_path: Path) -> None:
    file = tmp_path / "other.safetensors"
    save_file({"unet.x.lora_A.weight": torch.zeros(2, 3)}, file)
    words = (
        f"--lora {file} fits no layer of this checkpoint's UNet: not used would be unet.x.lora_A"
    )
    with refusal(BadInputFileError, words):
        sdxl.with_loras([LoraFile(file=str(file))], "float32")
    save_file({"weight": torch.zeros(1)}, file)
    with refusal(BadInputFileError, f"--lora {file} holds no LoRA layers", "but weight: choose"):
        parts_of(LoraFile(file=str(file)))


def test_another_models_shapes_are_one_sentence(sdxl: Model, tmp_path: Path) -> None:
    file, made = sdxl.make(FORMATS[0], tmp_path)
    tensors = {
        name: torch.zeros([n + 1 for n in tensor.shape]) for name, tensor in made.as_torch().items()
    }
    save_file(tensors, file, {"ss_base_model_version": "sd_v1"})
    with refusal(
        BadInputFileError,
        f"--lora {file} does not fit this checkpoint, trained for SD 1.x as it says: lora_unet_",
        "choose a LoRA for this family",
    ):
        sdxl.with_loras([LoraFile(file=str(file))], "float32")


@pytest.mark.parametrize("content", [float("nan"), float("inf")])
@pytest.mark.parametrize("piece", ["alpha", "lora_up.weight"])
def test_numbers_that_are_not_finite_name_their_tensor(
    sdxl: Model, tmp_path: Path, content: float, piece: str
) -> None:
    file, made = sdxl.make(FORMATS[0], tmp_path)
    tensors = made.as_torch()
    name = next(name for name in tensors if name.endswith(piece) and "unet" in name)
    tensors[name] = torch.full_like(tensors[name], content)
    save_file(tensors, file)
    with refusal(BadInputFileError, f"--lora {file}", name):
        sdxl.with_loras([LoraFile(file=str(file))], "float32")


def test_a_lora_counts_by_content_scale_and_what_it_changes(tmp_path: Path) -> None:
    unet, text = tmp_path / "unet.safetensors", tmp_path / "text.safetensors"
    save_file({"unet.a.alpha": torch.zeros(1)}, unet)
    save_file({"text_encoder.a.alpha": torch.zeros(1)}, text)
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


def test_a_damaged_lora_names_the_mend(run_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "style.safetensors"
    file.write_bytes(b"none")
    for number in (1, 2):
        with refusal(BadInputFileError, f"--lora {file} is damaged", "get it again"):
            call(number, "--output_dir", run_dir, "--lora", file)


def test_a_lora_for_a_text_encoder_that_is_not_there(sd: Model, tmp_path: Path) -> None:
    file = tmp_path / "xl.safetensors"
    save_file({"lora_te2_text_model_encoder_layers_0.alpha": torch.zeros(1)}, file)
    with refusal(
        BadInputFileError, f"--lora {file} changes text_encoder_2", "choose a LoRA for this family"
    ):
        call(1, "--output_dir", tmp_path / "run", "--model_id", sd.folder, "--lora", file)
