"""A run's VAE on a backend: what its two halves compute of arrays, and how they are measured.

`jax_runner` has the compiled programs, `torch_runner` the same module in PyTorch.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from common.compute.clock import StageReport
from common.compute.groups import group_size
from common.compute.options import RunOptions
from common.compute.profile_tables import Profiler
from common.files.report import Profile

# What can be computed: latents to pixels and whether all was finite; a tile of latents to
# [B, 3, H, W]; pictures, and a tile of them, to moments [B, 2C, h, w].
Program = Literal["decode_whole", "decode_tile", "encode_whole", "encode_tile"]


class VaeRunner(ABC):
    """One run's VAE, and the clock of what it computes."""

    devices_of_images: int  # that a group's images are spread over

    def __init__(self, vae: Any, report: StageReport) -> None:
        """`vae` is diffusers' module, in the dtype that it computes in."""
        self.module = vae
        self.config = vae.config
        self.dtype: torch.dtype = vae.dtype
        self.report = report
        self._counted = "run"  # the part of the report that the VAE's seconds count as
        self._run_seconds = 0.0

    @abstractmethod
    def compute(self, program: Program, array: np.ndarray, *, warm_up: bool = False) -> Any:
        """What a half of the VAE gives for latents or pictures, float32.

        Args:
            warm_up: run the program once before it is timed, when it is compiled.
        """

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What the report says of the devices."""

    @abstractmethod
    def profiler(self, folder: Path) -> Profiler:
        """A profiler of what is computed next, whose trace goes to a folder."""

    def group_size(self, images: int, options: RunOptions) -> int:
        """How many of a run's images are computed at once."""
        return group_size(images, options.batch_size, self.devices_of_images)

    def measure(
        self, compute: Callable[[], Any], options: RunOptions, profile_folder: Path
    ) -> Profile | None:
        """Compute something again, as often as `--repeat` and `--profile` ask for."""
        for _ in range(options.repeat):
            self._run_seconds = 0.0
            with self.counting_as("repeats"):
                compute()
            self.report.repeats.append(self._run_seconds)
        if not options.profile:
            return None
        profiler = self.profiler(profile_folder)
        profiler.start()
        with profiler.step(0), self.counting_as("profile"):
            compute()
        profiler.stop()
        return profiler.result()

    @contextmanager
    def counting_as(self, part: str) -> Iterator[None]:
        """Report the VAE's seconds as another part than `run`."""
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


def encode_moments(vae: Any, pictures: Any) -> Any:
    """The posterior's parameters [B, 2C, h, w]; of an `AutoencoderTiny` its latents [B, C, h, w].

    Args:
        pictures: [B, 3, H, W] in [-1, 1], in the VAE's dtype.
    """
    encoded = vae.encode(pictures)
    return encoded.latent_dist.parameters if has_posterior(vae) else encoded.latents


def has_posterior(vae: Any) -> bool:
    """Whether a VAE gives a distribution of latents; an `AutoencoderTiny` gives latents."""
    return type(vae).__name__ != "AutoencoderTiny"


def to_pixels(images: np.ndarray) -> tuple[np.ndarray, bool]:
    """[B, 3, H, W] float32 to [B, H, W, 3] uint8, and whether all values were finite.

    diffusers' VaeImageProcessor: denormalize, clamp, to 8 bits by rounding.
    """
    finite = bool(np.isfinite(images).all())
    with np.errstate(invalid="ignore"):  # what is not finite is refused by the caller
        pixels = np.round(np.clip(images / 2 + 0.5, 0, 1) * 255).astype(np.uint8)
    return pixels.transpose(0, 2, 3, 1), finite
