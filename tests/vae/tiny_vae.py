"""A real VAE that compiles in a second, and diffusers' own decoding by it."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.image_processor import VaeImageProcessor

from common.models.checkpoint import Checkpoint
from common.vae.loading import VaeToLoad

TILE = 8  # rows and columns of latents; pictures are twice as large as their latents


def save_vae(folder: Path, *, seed: int = 0) -> Checkpoint:
    """A checkpoint's VAE with random weights, which differ with the seed alone."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=2 * TILE,
        force_upcast=False,
    )
    vae.save_pretrained(folder / "vae")
    return Checkpoint(str(folder), folder)


def save_tiny_autoencoder(folder: Path) -> Checkpoint:
    """The same with an `AutoencoderTiny`, as TAESD is one."""
    torch.manual_seed(0)
    widths: dict[str, Any] = dict.fromkeys(
        ("encoder_block_out_channels", "decoder_block_out_channels"), (8, 8)
    )
    blocks: dict[str, Any] = dict.fromkeys(("num_encoder_blocks", "num_decoder_blocks"), (1, 1))
    AutoencoderTiny(**widths, **blocks).save_pretrained(folder / "vae")
    return Checkpoint(str(folder), folder)


def to_load(checkpoint: Checkpoint, *, dtype: str = "float32", tile: bool = False) -> VaeToLoad:
    return VaeToLoad(checkpoint=checkpoint, dtype=dtype, tile=tile)


def random_latents(*shape: int, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def load_by_diffusers(checkpoint: Checkpoint) -> Any:
    config = AutoencoderKL.load_config(checkpoint.folder / "vae")
    kind = {each.__name__: each for each in (AutoencoderKL, AutoencoderTiny)}
    return kind[config["_class_name"]].from_pretrained(checkpoint.folder / "vae")


@torch.no_grad()
def decode_by_diffusers(
    checkpoint: Checkpoint, latents: np.ndarray, *, tile: bool = False
) -> np.ndarray:
    """Latents [B, C, h, w] to [B, H, W, 3] uint8 by diffusers' VAE and image processor."""
    vae = load_by_diffusers(checkpoint)
    if tile:
        vae.enable_tiling()
    images = vae.decode(torch.from_numpy(latents) / vae.config.scaling_factor).sample
    pictures = VaeImageProcessor().postprocess(images, output_type="np")
    return np.asarray((pictures * 255).round().astype(np.uint8))


@torch.no_grad()
def encode_by_diffusers(
    checkpoint: Checkpoint, pictures: np.ndarray, *, tile: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Pictures [B, 3, H, W] to the posterior's mean and standard deviation by diffusers' VAE."""
    vae = load_by_diffusers(checkpoint)
    if tile:
        vae.enable_tiling()
    encoded = vae.encode(torch.from_numpy(pictures))
    if hasattr(encoded, "latents"):
        return encoded.latents.numpy(), np.zeros_like(encoded.latents.numpy())
    return encoded.latent_dist.mean.numpy(), encoded.latent_dist.std.numpy()


def largest_difference(actual: np.ndarray, expected: np.ndarray) -> int:
    """Of two sets of 8-bit pictures."""
    return int(np.abs(actual.astype(int) - expected.astype(int)).max())
