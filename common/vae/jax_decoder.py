"""The compiled decoding programs, for TPU, GPU or CPU: one, or one for each shape of a tile."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from common.compute.devices import Devices, device_facts, fetch
from common.compute.fast_ops import finish, products_for, replacements
from common.compute.jax_profiler import JaxProfiler
from common.compute.jax_start import CompiledProgram, compile_program
from common.compute.sharding import ActivationLayout, split_latents
from common.compute.torchax_runtime import Parameters, as_jax_function
from common.files.report import StageReport
from common.vae.decoder import Decoder, Tiles


def to_pixels(images: Array) -> tuple[Array, Array]:
    """As `decoding.to_pixels`, within a program: less to fetch from the devices."""
    pixels = jnp.round(jnp.clip(images / 2 + 0.5, 0, 1) * 255).astype(jnp.uint8)
    return pixels.transpose(0, 2, 3, 1), jnp.isfinite(images).all()


class JaxDecoder(Decoder):
    """The VAE on the devices of a mesh, and its compiled programs."""

    def __init__(
        self,
        vae: Any,
        parameters: Parameters,
        mesh: Mesh,
        devices: Devices,
        tiles: Tiles | None,
        operations: str,
        report: StageReport,
    ) -> None:
        """
        Args:
            vae: diffusers' module, for its code.
            parameters: its weights on the devices of the mesh.
            devices: those of the mesh; for ones that are not there, programs can only be lowered.
            tiles: None to decode pictures whole.
            operations: "fast" or "torchax".
        """
        super().__init__(vae, tiles, report)
        self.parameters = parameters
        self.mesh = mesh
        self.devices_of_images = mesh.shape["data"]
        self.devices = devices
        self.compiled: dict[tuple[int, ...], CompiledProgram] = {}
        layout = ActivationLayout(mesh, ("data",), ("rows",)) if mesh.size > 1 else None
        self.vae = as_jax_function(
            vae,
            "decode",
            replacements=replacements(layout, devices.platform, operations),
            finish=partial(finish, layout=layout, platform=devices.platform),
        )

    def lower(self, shape: tuple[int, ...]) -> Any:
        """Trace the program for latents [B, C, h, w], of whole pictures or of tiles."""
        latents = self.devices.describe(shape, "float32", split_latents(self.mesh))
        return jax.jit(self._program()).lower(self.parameters, latents)

    def _program(self) -> Callable[..., Any]:
        return self.decode_whole if self.tiles is None else self.decode_tile

    def decode_whole(self, parameters: Parameters, scaled: Array) -> tuple[Array, Array]:
        """The program of pictures that are decoded whole."""
        return to_pixels(self.decode_tile(parameters, scaled))

    def decode_tile(self, parameters: Parameters, scaled: Array) -> Array:
        """[B, C, h, w] as the VAE takes them to [B, 3, H, W] float32."""
        dtype = jnp.dtype(str(self.dtype).removeprefix("torch."))
        with products_for(dtype):
            images = self.vae(parameters, scaled.astype(dtype), return_dict=False)[0]
        return images.astype(jnp.float32)

    def _decode_whole(self, scaled: np.ndarray, warm_up: bool) -> tuple[np.ndarray, bool]:
        pixels, finite = self._run(scaled, warm_up)
        return pixels, bool(finite)

    def _decode_tile(self, scaled: np.ndarray, warm_up: bool) -> np.ndarray:
        return np.asarray(self._run(scaled, warm_up))

    def _run(self, scaled: np.ndarray, warm_up: bool) -> Any:
        """Run the program for the latents' shape, which is compiled the first time."""
        with self.report.part("host_to_device"):
            latents_there = self.devices.put(scaled, split_latents(self.mesh))
        if scaled.shape not in self.compiled:
            with self.report.part("trace"):
                lowered = self.lower(scaled.shape)
            self.compiled[scaled.shape] = compile_program(
                lowered, self._program().__name__, self.report
            )
            if warm_up:
                with self.report.part("warm_up"):
                    program = self.compiled[scaled.shape]
                    jax.block_until_ready(program(self.parameters, latents_there))
        program = self.compiled[scaled.shape]
        with self._running():
            result = jax.block_until_ready(program(self.parameters, latents_there))
        self.report.count_flops(self._counted, (program.flops or 0.0) * self.mesh.size)
        with self.report.part("device_to_host"):
            return jax.tree.map(fetch, result)

    def facts(self) -> dict[str, Any]:
        return device_facts(self.mesh, self.dtype)

    def profiler(self, folder: Path) -> JaxProfiler:
        return JaxProfiler(folder, None, self.report, self.compiled, self.module)
