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
from common.compute.groups import group_size, groups
from common.compute.options import RunOptions
from common.compute.profile_tables import Profiler
from common.errors import NotFiniteError
from common.files.kept_progress import Progress
from common.files.report import Profile
from common.progress import Shown
from common.stopping import StopRequest

# What can be computed: latents to pixels and whether all was finite; a tile of latents to
# [B, 3, H, W]; pictures, and a tile of them, to moments [B, 2C, h, w].
Program = Literal["decode_whole", "decode_tile", "encode_whole", "encode_tile"]
Arrays = dict[str, np.ndarray]


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
        return group_size(options.at_once(images), self.devices_of_images)

    def in_groups(
        self,
        inputs: np.ndarray,
        compute: Callable[[np.ndarray], Arrays],
        options: RunOptions,
        *,
        bar: Shown,
        units: str,
        progress: Progress | None = None,
        stop: StopRequest | None = None,
    ) -> Arrays:
        """Compute something of all inputs [B, …], in groups of one shape.

        Args:
            compute: arrays [B, …] by their names, of one group.
            bar: how far it is, as `progress_bar` gives it.
            units: what the inputs are, in words.
            progress: where each group's arrays are kept until all are done, if there are several.
            stop: asked after each group that is computed.

        Raises:
            StoppedError: a stop was asked for; what is done is kept.
        """
        count = len(inputs)
        size, done, found = self.group_size(count, options), 0, []
        with bar as shown:
            for number, (chosen, real) in enumerate(groups(count, size)):
                kept = progress.read_group(number) if progress is not None else None
                if kept is not None:
                    made = {name: tensor.numpy() for name, tensor in kept.items()}
                    shown.skip(real)
                else:
                    made = {name: a[:real] for name, a in compute(inputs[chosen]).items()}
                found.append(made)
                done += real
                if kept is not None:
                    continue
                shown.update(real)
                if count <= size:
                    continue
                if progress is not None:
                    tensors = {name: torch.from_numpy(a.copy()) for name, a in made.items()}
                    progress.save_group(number, tensors)
                if stop is not None:
                    stop.raise_if_asked(
                        f"after {done} of {count} {units}, which are kept: the same command goes "
                        "on from there"
                    )
        return {name: np.concatenate([made[name] for made in found]) for name in found[0]}

    def first_group(self, inputs: np.ndarray, options: RunOptions) -> np.ndarray:
        """The inputs that are computed at once first."""
        size = self.group_size(len(inputs), options)
        return inputs[next(groups(len(inputs), size))[0]]

    def refuse_infinities(self, finite: bool, unwritten: str) -> None:
        """Raise `NotFiniteError` where the VAE gave infinities or not-a-numbers."""
        if not finite:
            dtype = str(self.dtype).removeprefix("torch.")
            raise NotFiniteError(
                f"the VAE in {dtype} gave values that are not finite, so no {unwritten} written: "
                "use --vae_dtype float32"
            )

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
