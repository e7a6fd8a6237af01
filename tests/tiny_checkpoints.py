"""Tiny checkpoints: real components of diffusers and transformers with random weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors import safe_open
from safetensors.numpy import save_file as save_numpy
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from tests.conftest import DEMO
from tools.demo.train import FOREIGN_SCHEDULER_CONFIG, SCHEDULER_CONFIG, VAE_CONFIG

LATENT_SIZE = 8  # of the native picture, which is 8 times as large
# What the public checkpoints' scheduler_config.json name, those for other schedulers included.
OF_THE_DEMO_ALONE = ("prediction_type", "timestep_spacing")
SCHEDULER = {
    name: value
    for name, value in (SCHEDULER_CONFIG | FOREIGN_SCHEDULER_CONFIG).items()
    if name not in OF_THE_DEMO_ALONE
}


def save_sdxl(folder: Path, **unet_changes: Any) -> Path:
    """An SDXL checkpoint: two text encoders, size conditions, Euler."""
    torch.manual_seed(1)
    tokenizer = CLIPTokenizer.from_pretrained(DEMO / "tokenizer")
    settings = _text_settings(tokenizer)
    StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(CLIPTextConfig(hidden_size=32, projection_dim=32, **settings)),
        text_encoder_2=CLIPTextModelWithProjection(
            CLIPTextConfig(hidden_size=48, projection_dim=24, **settings)
        ),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=_unet(
            cross_attention_dim=32 + 48,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24 + 6 * 8,
            use_linear_projection=True,
            **unet_changes,
        ),
        scheduler=EulerDiscreteScheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    ).save_pretrained(folder)
    _write_scheduler(folder, "EulerDiscreteScheduler", timestep_spacing="leading")
    return folder


def save_tiniest(folder: Path) -> Path:
    """An SD checkpoint whose models are some hundred kB, most of it the words."""
    narrow = {"block_out_channels": (8, 16), "norm_num_groups": 4}
    return save_sd(folder, **narrow)


def save_refiner(folder: Path) -> Path:
    """A checkpoint as SDXL's refiner: the second text encoder alone, aesthetic scores, Euler."""
    torch.manual_seed(3)
    tokenizer = CLIPTokenizer.from_pretrained(DEMO / "tokenizer")
    settings = _text_settings(tokenizer)
    StableDiffusionXLImg2ImgPipeline(
        vae=_vae(),
        text_encoder=None,
        text_encoder_2=CLIPTextModelWithProjection(
            CLIPTextConfig(hidden_size=48, projection_dim=24, **settings)
        ),
        tokenizer=None,
        tokenizer_2=tokenizer,
        unet=_unet(
            cross_attention_dim=48,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24 + 5 * 8,
            use_linear_projection=True,
        ),
        scheduler=EulerDiscreteScheduler(),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    ).save_pretrained(folder)
    _write_scheduler(folder, "EulerDiscreteScheduler", timestep_spacing="leading")
    return folder


def save_sd(folder: Path, *, prediction_type: str = "epsilon", **unet_changes: Any) -> Path:
    """An SD 1.x/2.x checkpoint: PNDM for epsilon, DDIM for v_prediction, as their authors have."""
    torch.manual_seed(2)
    tokenizer = CLIPTokenizer.from_pretrained(DEMO / "tokenizer")
    text_config = CLIPTextConfig(hidden_size=32, projection_dim=32, **_text_settings(tokenizer))
    StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(text_config),
        tokenizer=tokenizer,
        unet=_unet(cross_attention_dim=32, **unet_changes),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    own = {"epsilon": "PNDMScheduler", "v_prediction": "DDIMScheduler"}[prediction_type]
    _write_scheduler(folder, own, prediction_type=prediction_type)
    return folder


def _write_scheduler(folder: Path, class_name: str, **settings: Any) -> None:
    """Write a scheduler's settings as the public checkpoints do, with only what they name."""
    content = {"_class_name": class_name, **SCHEDULER, **settings}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(content))
    index_file = folder / "model_index.json"
    index = json.loads(index_file.read_text())
    index["scheduler"] = ["diffusers", class_name]
    index_file.write_text(json.dumps(index))


def _text_settings(tokenizer: CLIPTokenizer) -> dict[str, Any]:
    size = len(tokenizer)
    return dict(
        vocab_size=size,
        bos_token_id=size - 2,
        eos_token_id=size - 1,
        pad_token_id=size - 1,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=3,
    )


def _unet(**changes: Any) -> UNet2DConditionModel:
    changes = {"block_out_channels": (32, 64)} | changes
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        **changes,
    )


def _vae() -> AutoencoderKL:
    """The demo checkpoint's VAE, but narrower, and with what is diffusers' own default."""
    own = dict(block_out_channels=(8, 16, 16, 16), sample_size=32, force_upcast=True)
    return AutoencoderKL(**VAE_CONFIG | own)


def save_demo_lora(file: Path, *, seed: int = 0, size: float = 1.0) -> Path:
    """A LoRA of rank 2 for the demo checkpoint's UNet and first text encoder.

    Args:
        size: of its numbers' spread.
    """
    random, tensors = np.random.default_rng(seed), {}
    for part, weights, layer in (
        ("unet", "diffusion_pytorch_model", "to_q"),
        ("text_encoder", "model", "q_proj"),
    ):
        with safe_open(DEMO / part / f"{weights}.safetensors", "np") as model:
            for name in model.keys():  # noqa: SIM118
                if name.endswith(f".{layer}.weight"):
                    rows, columns = model.get_slice(name).get_shape()
                    key = f"{part}.{name.removesuffix('.weight')}"
                    tensors[f"{key}.lora_A.weight"] = random.normal(size=(2, columns)) * size
                    tensors[f"{key}.lora_B.weight"] = random.normal(size=(rows, 2)) * size
    assert tensors
    save_numpy({name: tensor.astype("float32") for name, tensor in tensors.items()}, file)
    return file
