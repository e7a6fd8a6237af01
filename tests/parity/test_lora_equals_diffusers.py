"""LoRA files, made by peft with alpha ≠ r, give the latents that diffusers' pipeline gives."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from common.errors import BadInputFileError
from common.models.lora import lora_settings, parts_of
from common.models.model_settings import LoraFile
from common.runs.generation import RunSettings, read_generation_config
from tests.conftest import Run
from tests.in_process import Ours, load_pipeline, make_config, relative_difference, run_pipeline
from tests.tiny_checkpoints import save_sd, save_sdxl

SMALL = dict(height=64, width=64, num_inference_steps=3, batch=2)
TARGETS = {
    "unet": ["to_q", "to_k", "to_v", "to_out.0"],
    "text_encoder": ["q_proj", "v_proj", "fc1"],
    "text_encoder_2": ["k_proj", "out_proj"],
}


@pytest.fixture(scope="module", params=["SDXL", "SD"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    save = save_sdxl if request.param == "SDXL" else save_sd
    return save(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sdxl(tmp_path_factory.mktemp("tiny") / "sdxl")


def make_lora(model: Path, file: Path, seed: int, parts: list[str]) -> Path:
    """Train nothing: random layers of rank 4 and alpha 6, saved by diffusers."""
    pipeline = load_pipeline(model)
    torch.manual_seed(seed)
    layers: dict[str, Any] = {}
    config: dict[str, Any] = {}
    for part in parts:
        module = getattr(pipeline, part, None)
        if module is None:
            continue
        lora = LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS[part], init_lora_weights=False)
        module.add_adapter(lora, adapter_name="default")
        layers[f"{part}_lora_layers"] = get_peft_model_state_dict(module)
        config[f"{part}_lora_adapter_metadata"] = lora.to_dict()
    pipeline.save_lora_weights(file.parent, weight_name=file.name, **layers, **config)
    return file


def run_both(model: Path, loras: list[tuple[Path, float]]) -> tuple[float, float]:
    """The distance of our latents from diffusers' with the LoRAs, and from ours without."""
    config = make_config(model, **SMALL)
    pipeline = load_pipeline(model)
    for index, (file, _) in enumerate(loras):
        pipeline.load_lora_weights(str(file), adapter_name=f"lora{index}")
    names = [f"lora{index}" for index in range(len(loras))]
    pipeline.set_adapters(names, [scale for _, scale in loras])
    expected, _ = run_pipeline(pipeline, config)
    latents = Ours(model, loras=[f"{file}:{scale}" for file, scale in loras]).denoise(config)
    plain = Ours(model).denoise(config)
    return relative_difference(latents, expected), relative_difference(latents, plain)


def test_one_lora_with_a_scale(model: Path, tmp_path: Path) -> None:
    file = make_lora(model, tmp_path / "a.safetensors", 1, list(TARGETS))
    apart, changed = run_both(model, [(file, 0.7)])
    assert apart < 1e-4 < 1e-2 < changed


def test_a_lora_by_torch(sdxl: Path, tmp_path: Path) -> None:
    """diffusers reads the whole UNet for it, and the module gets the fused weights back."""
    file = make_lora(sdxl, tmp_path / "a.safetensors", 1, list(TARGETS))
    config = make_config(sdxl, num_inference_steps=3, guidance_scale=2.0)
    by_torch, by_jax = (
        Ours(sdxl, backend=backend, loras=[f"{file}:0.7"]).denoise(config)
        for backend in ("torch", "jax")
    )
    assert relative_difference(by_torch, by_jax) < 1e-5


def test_several_loras_add_up(sdxl: Path, tmp_path: Path) -> None:
    first = make_lora(sdxl, tmp_path / "a.safetensors", 1, list(TARGETS))
    second = make_lora(sdxl, tmp_path / "b.safetensors", 2, ["unet"])
    apart, changed = run_both(sdxl, [(first, 0.5), (second, -0.4)])
    assert apart < 1e-4 < 1e-2 < changed


def test_kohyas_layout(sdxl: Path, tmp_path: Path) -> None:
    tensors = load_file(make_lora(sdxl, tmp_path / "a.safetensors", 3, ["unet"]))
    kohya = convert_state_dict_to_kohya({k.removeprefix("unet."): v for k, v in tensors.items()})
    renamed = {}
    for key, tensor in kohya.items():
        if ".lora_" in key:
            layer, _, rest = key.removeprefix("lora_unet_").partition(".lora_")
            name = f"lora_unet_{layer.replace('.', '_')}"
            renamed |= {f"{name}.lora_{rest}": tensor, f"{name}.alpha": torch.tensor(6.0)}
    file = tmp_path / "kohya.safetensors"
    save_file(renamed, file)
    assert parts_of(LoraFile(file=str(file))) == {"unet"}
    apart, changed = run_both(sdxl, [(file, 1.0)])
    assert apart < 1e-4 < 1e-2 < changed


def test_only_what_a_lora_changes_becomes_stale(sdxl: Path, tmp_path: Path) -> None:
    file = make_lora(sdxl, tmp_path / "a.safetensors", 1, ["unet"])
    (lora,) = RunSettings(loras=f"{file}:0.5").loras
    assert lora_settings([lora], ["text_encoder", "text_encoder_2"]) == []
    (entry,) = lora_settings([lora], ["unet"])
    moved = file.rename(tmp_path / "moved.safetensors")
    assert lora_settings([LoraFile(file=str(moved), scale=0.5)], ["unet"]) == [entry]
    assert lora_settings([LoraFile(file=str(moved))], ["unet"]) != [entry]


@pytest.mark.slow
def test_a_run_keeps_its_loras(sdxl: Path, tmp_path: Path, run_all: Run, stage: Run) -> None:
    file = make_lora(sdxl, tmp_path / "a.safetensors", 1, list(TARGETS))
    run_dir = tmp_path / "run"
    base = ["--model_id", sdxl, "--output_dir", run_dir, "--num_inference_steps", 3]
    result = run_all(*base, "--lora", f"{file}:0.7")
    assert result.returncode == 0, result.stderr
    latents = load_file(run_dir / "stage2_latents.safetensors")["latents"].numpy()
    result = stage(2, "--output_dir", run_dir, "--skip_fresh")
    assert "fresh" in result.stdout, result.stdout
    config = make_config(sdxl, height=64, width=64, num_inference_steps=3)
    config = config.model_copy(update={"prompts": read_generation_config(run_dir).prompts})
    expected = Ours(sdxl, loras=[f"{file}:0.7"]).denoise(config)
    assert relative_difference(latents, expected) < 1e-5


@pytest.mark.parametrize(
    ("name", "tensors", "words"),
    [
        ("none.safetensors", None, "is no safetensors file"),
        ("other.safetensors", {"weight": torch.zeros(2)}, "holds no LoRA layers"),
        ("wide.safetensors", {}, "does not fit this checkpoint"),
    ],
)
def test_a_bad_lora_file_is_one_sentence(
    sdxl: Path, tmp_path: Path, name: str, tensors: dict[str, torch.Tensor] | None, words: str
) -> None:
    file = tmp_path / name
    if name == "wide.safetensors":
        made = load_file(make_lora(sdxl, tmp_path / "a.safetensors", 1, ["unet"]))
        tensors = {key: torch.zeros(*(n + 1 for n in t.shape)) for key, t in made.items()}
    if tensors is not None:
        save_file(tensors, file)
    with pytest.raises(BadInputFileError, match=words):
        Ours(sdxl, loras=[str(file)]).denoise(make_config(sdxl, **SMALL))
