"""Decoding by diffusers' VAE in PyTorch, on the CPU."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.compute.backends import TORCH_FACTS
from common.compute.clock import StageReport
from common.compute.torch_profiler import TorchProfiler
from common.vae.decoder import Decoder, to_pixels
from common.vae.tiles import Tiles


class TorchDecoder(Decoder):
    """One run's decoding by the VAE as PyTorch runs it."""

    devices_of_images = 1

    def __init__(self, vae: Any, tiles: Tiles | None, report: StageReport) -> None:
        """`vae` holds its weights."""
        super().__init__(vae, tiles, report)
        self.warm = False

    def _decode_whole(self, scaled: np.ndarray, warm_up: bool) -> tuple[np.ndarray, bool]:
        return to_pixels(self._decode_tile(scaled, warm_up))

    @torch.inference_mode()
    def _decode_tile(self, scaled: np.ndarray, warm_up: bool) -> np.ndarray:
        latents = torch.from_numpy(scaled).to(self.dtype)
        if warm_up and not self.warm:
            with self.report.part("warm_up"):
                self.module.decode(latents, return_dict=False)
        self.warm = True
        with self._running():
            images = self.module.decode(latents, return_dict=False)[0]
        return np.asarray(images.float().numpy())

    def facts(self) -> dict[str, Any]:
        return TORCH_FACTS

    def profiler(self, folder: Path) -> TorchProfiler:
        file = folder / "decode.pt.trace.json.gz"
        return TorchProfiler(file, None, self.report, {"vae": self.module})
