"""The compiled decoding programs, for TPU, GPU or CPU: one, or one for each shape of a tile."""

from collections.abc import Callable, MutableMapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from common.compute.clock import StageReport
from common.compute.devices import ModelOnDevices, device_facts, fetch
from common.compute.fast_ops import finish, products_for, replacements
from common.compute.jax_profiler import JaxProfiler
from common.compute.programs import CompiledProgram, compile_program
from common.compute.sharding import ActivationLayout, split_latents
from common.compute.torchax_runtime import Parameters, as_jax_function
from common.vae.decoder import Decoder
from common.vae.tiles import Tiles

ProgramKey = tuple[str, tuple[int, ...]]  # its name, and the shape of its latents
Programs = MutableMapping[ProgramKey, CompiledProgram]


class JaxDecoder(Decoder):
    """One run's decoding by a VAE on devices, and its compiled programs."""

    def __init__(
        self, vae: ModelOnDevices, tiles: Tiles | None, report: StageReport, programs: Programs
    ) -> None:
        """
        Args:
            tiles: None to decode pictures whole.
            programs: those compiled before, which differ in nothing else than what keys say.
        """
        super().__init__(vae.module, tiles, report)
        self.vae = vae
        self.mesh = vae.mesh
        self.devices_of_images = vae.mesh.shape["data"]
        self.programs = programs
        self.program_name = "decode_whole" if tiles is None else "decode_tile"
        self.used: dict[ProgramKey, CompiledProgram] = {}  # in this run

    def lower(self, shape: tuple[int, ...]) -> Any:
        """Trace the program for latents [B, C, h, w], of whole pictures or of tiles."""
        vae, mesh = self.vae, self.mesh
        layout = ActivationLayout(mesh, ("data",), ("rows",)) if mesh.size > 1 else None
        function = as_jax_function(
            vae.module,
            "decode",
            replacements=replacements(layout, vae.devices.platform, vae.operations),
            finish=partial(finish, layout=layout, platform=vae.devices.platform),
        )
        latents = vae.devices.describe(shape, "float32", split_latents(mesh))
        return jax.jit(self._program(function)).lower(vae.parameters, latents)

    def _program(self, vae: Callable[..., Any]) -> Callable[..., Any]:
        """What is compiled: pictures as `to_pixels` makes them, or a tile [B, 3, H, W] float32."""
        dtype = jnp.dtype(str(self.dtype).removeprefix("torch."))

        def decode_tile(parameters: Parameters, scaled: Array) -> Array:
            with products_for(dtype):
                images = vae(parameters, scaled.astype(dtype), return_dict=False)[0]
            return images.astype(jnp.float32)

        def decode_whole(parameters: Parameters, scaled: Array) -> tuple[Array, Array]:
            return to_pixels(decode_tile(parameters, scaled))

        return decode_whole if self.tiles is None else decode_tile

    def _decode_whole(self, scaled: np.ndarray, warm_up: bool) -> tuple[np.ndarray, bool]:
        pixels, finite = self._run(scaled, warm_up)
        return pixels, bool(finite)

    def _decode_tile(self, scaled: np.ndarray, warm_up: bool) -> np.ndarray:
        return np.asarray(self._run(scaled, warm_up))

    def _run(self, scaled: np.ndarray, warm_up: bool) -> Any:
        """Run the program for the latents' shape, which is compiled where no run did so before."""
        with self.report.part("host_to_device"):
            latents_there = self.vae.devices.put(scaled, split_latents(self.mesh))
        arguments = self.vae.parameters, latents_there
        key = self.program_name, scaled.shape
        if key not in self.used:
            program = self.used[key] = self._compiled(key)
            if warm_up:
                with self.report.part("warm_up"):
                    jax.block_until_ready(program(*arguments))
        program = self.used[key]
        with self._running():
            result = jax.block_until_ready(program(*arguments))
        self.report.count_flops(self._counted, (program.flops or 0.0) * self.mesh.size)
        with self.report.part("device_to_host"):
            return jax.tree.map(fetch, result)

    def _compiled(self, key: ProgramKey) -> CompiledProgram:
        if key not in self.programs:
            name, shape = key
            lower = partial(self.lower, shape)
            self.programs[key] = compile_program(lower, name, self.report)
        return self.programs[key]

    def facts(self) -> dict[str, Any]:
        return device_facts(self.mesh, self.dtype)

    def profiler(self, folder: Path) -> JaxProfiler:
        return JaxProfiler(folder, None, self.report, self.used, self.module)


def to_pixels(images: Array) -> tuple[Array, Array]:
    """As `decoder.to_pixels`, within a program: less to fetch from the devices."""
    pixels = jnp.round(jnp.clip(images / 2 + 0.5, 0, 1) * 255).astype(jnp.uint8)
    return pixels.transpose(0, 2, 3, 1), jnp.isfinite(images).all()
