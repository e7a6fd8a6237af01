"""The VAE as PyTorch runs it, on the CPU."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.compute.backends import TORCH_FACTS
from common.compute.clock import StageReport
from common.compute.torch_profiler import TorchProfiler
from common.vae.runner import Program, VaeRunner, encode_moments, to_pixels


class TorchRunner(VaeRunner):
    """One run's VAE by PyTorch."""

    devices_of_images = 1

    def __init__(self, vae: Any, report: StageReport) -> None:
        """`vae` holds its weights."""
        super().__init__(vae, report)
        self.warm = False

    @torch.inference_mode()
    def compute(self, program: Program, array: np.ndarray, *, warm_up: bool = False) -> Any:
        inputs = torch.from_numpy(array).to(self.dtype)
        decodes = program.startswith("decode")

        def run() -> torch.Tensor:
            if decodes:
                images: torch.Tensor = self.module.decode(inputs, return_dict=False)[0]
                return images
            moments: torch.Tensor = encode_moments(self.module, inputs)
            return moments

        if warm_up and not self.warm:
            with self.report.part("warm_up"):
                run()
        self.warm = True
        with self._running():
            result = run()
        computed = np.asarray(result.float().numpy())
        return to_pixels(computed) if program == "decode_whole" else computed

    def facts(self) -> dict[str, Any]:
        return TORCH_FACTS

    def profiler(self, folder: Path) -> TorchProfiler:
        return TorchProfiler(
            folder / "vae.pt.trace.json.gz", None, self.report, {"vae": self.module}
        )
