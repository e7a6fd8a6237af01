"""Decoding latents to 8-bit pictures, whole or in tiles.

`jax_decoder` is the compiled program, `torch_decoder` the same module in PyTorch.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.compute.clock import StageReport
from common.compute.groups import group_size
from common.compute.options import RunOptions
from common.compute.profile_tables import Profiler
from common.files.report import Profile
from common.vae.tiles import Tiles


def unscale_latents(latents: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """Undo the VAE's own scaling of its latents, as diffusers' SDXL pipeline does.

    Args:
        latents: [B, C, h, w] float32.
        config: the VAE's config.
    """
    unscaled = latents / np.float32(config["scaling_factor"])
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return unscaled
    mean, std = (np.asarray(values, np.float32).reshape(1, -1, 1, 1) for values in (mean, std))
    return latents * std / np.float32(config["scaling_factor"]) + mean


class Decoder(ABC):
    """One run's decoding by the VAE of a backend, and how it is measured."""

    devices_of_images: int  # that a group's images are spread over

    def __init__(self, vae: Any, tiles: Tiles | None, report: StageReport) -> None:
        """
        Args:
            vae: diffusers' module, in the dtype that it computes in.
            tiles: None to decode pictures whole.
        """
        self.module = vae
        self.config = vae.config
        self.dtype: torch.dtype = vae.dtype
        self.tiles = tiles
        self.report = report
        self._counted = "run"  # the part of the report that the decoder's seconds count as
        self._run_seconds = 0.0

    def group_size(self, images: int, options: RunOptions) -> int:
        """How many of a run's images are decoded at once."""
        return group_size(images, options.batch_size, self.devices_of_images)

    def decode(self, latents: np.ndarray, *, warm_up: bool = False) -> tuple[np.ndarray, bool]:
        """Latents [B, C, h, w] float32 to [B, H, W, 3] uint8, and whether all was finite.

        Args:
            warm_up: run each program once before it is timed, when it is compiled.
        """
        scaled = unscale_latents(latents, self.config)
        if self.tiles is None:
            return self._decode_whole(scaled, warm_up)
        with self.report.part("blending"):
            images = self.tiles.decode(scaled, lambda tile: self._decode_tile(tile, warm_up))
            return to_pixels(images)

    @abstractmethod
    def _decode_whole(self, scaled: np.ndarray, warm_up: bool) -> tuple[np.ndarray, bool]:
        """[B, C, h, w] as the VAE takes them to what `decode` returns."""

    @abstractmethod
    def _decode_tile(self, scaled: np.ndarray, warm_up: bool) -> np.ndarray:
        """[B, C, h, w] as the VAE takes them to [B, 3, H, W] float32."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What the report says of the devices."""

    @abstractmethod
    def profiler(self, folder: Path) -> Profiler:
        """A profiler of a decoding, whose trace goes to a folder."""

    def repeat(self, latents: np.ndarray, times: int) -> None:
        """Measure the decoding some times more."""
        for _ in range(times):
            self._run_seconds = 0.0
            with self.counting_as("repeats"):
                self.decode(latents)
            self.report.repeats.append(self._run_seconds)

    def profile(self, latents: np.ndarray, folder: Path) -> Profile:
        """Decode once more under the profiler."""
        profiler = self.profiler(folder)
        profiler.start()
        with profiler.step(0), self.counting_as("profile"):
            self.decode(latents)
        profiler.stop()
        return profiler.result()

    @contextmanager
    def counting_as(self, part: str) -> Iterator[None]:
        """Report the decoder's seconds as another part than `run`."""
        self._counted = part
        try:
            with self.report.part(part):
                yield
        finally:
            self._counted = "run"

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Count a block's seconds, which ends when the devices are done."""
        with self.report.part(self._counted):
            began = time.perf_counter()
            yield
            self._run_seconds += time.perf_counter() - began


def to_pixels(images: np.ndarray) -> tuple[np.ndarray, bool]:
    """[B, 3, H, W] float32 to [B, H, W, 3] uint8, and whether all values were finite.

    diffusers' VaeImageProcessor: denormalize, clamp, to 8 bits by rounding.
    """
    finite = bool(np.isfinite(images).all())
    with np.errstate(invalid="ignore"):  # what is not finite is refused by the caller
        pixels = np.round(np.clip(images / 2 + 0.5, 0, 1) * 255).astype(np.uint8)
    return pixels.transpose(0, 2, 3, 1), finite
