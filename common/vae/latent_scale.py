"""The VAE's own scaling of its latents, as diffusers' SDXL pipelines do it, in both directions."""

from collections.abc import Mapping
from typing import Any

import numpy as np


def unscale_latents(latents: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    """The UNet's latents as the VAE takes them.

    Args:
        latents: [B, C, h, w] float32.
        config: the VAE's config.
    """
    unscaled = latents / np.float32(config["scaling_factor"])
    statistics = _statistics(config)
    if statistics is None:
        return unscaled
    mean, std = statistics
    return latents * std / np.float32(config["scaling_factor"]) + mean


def scale_latents(latents: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    """The VAE's latents as the UNet takes them: what `unscale_latents` undoes."""
    statistics = _statistics(config)
    if statistics is None:
        return latents * np.float32(config["scaling_factor"])
    mean, std = statistics
    return (latents - mean) * np.float32(config["scaling_factor"]) / std


def _statistics(config: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray] | None:
    """Mean and standard deviation of the latents by channel; diffusers wants both or none."""
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return None
    mean, std = (np.asarray(values, np.float32).reshape(1, -1, 1, 1) for values in (mean, std))
    return mean, std
