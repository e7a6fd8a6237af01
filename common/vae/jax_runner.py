"""The VAE's compiled programs, for TPU, GPU or CPU: one for each half and shape."""

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
from common.compute.program_store import ToCompile, lower_stored
from common.compute.programs import CompiledProgram, compile_program, compiled_in
from common.compute.sharding import ActivationLayout, split_latents
from common.compute.torchax_runtime import Parameters, as_jax_function
from common.vae.runner import Program, VaeRunner, encode_moments

ProgramKey = tuple[Program, tuple[int, ...]]  # and the shape of what it is given
Programs = MutableMapping[ProgramKey, CompiledProgram]


class JaxRunner(VaeRunner):
    """One run's VAE on devices, and its compiled programs."""

    def __init__(self, vae: ModelOnDevices, report: StageReport, programs: Programs) -> None:
        """`programs` are those compiled before, which differ in nothing else than what keys say."""
        super().__init__(vae.module, report)
        self.vae = vae
        self.mesh = vae.mesh
        self.devices_of_images = vae.mesh.shape["data"]
        self.programs = programs
        self.used: dict[ProgramKey, CompiledProgram] = {}  # in this run

    def lower(self, program: Program, shape: tuple[int, ...]) -> Any:
        """Trace a program for latents [B, C, h, w] or pictures [B, 3, H, W], float32."""
        return self._to_compile(program, shape).lower()

    def _to_compile(self, program: Program, shape: tuple[int, ...]) -> ToCompile:
        given = self.vae.devices.describe(shape, "float32", split_latents(self.mesh))
        return ToCompile(
            name=program,
            function=self._function(program),
            arguments=(self.vae.parameters, given),
        )

    def _function(self, program: Program) -> Callable[..., Any]:
        """What is compiled."""
        vae, mesh = self.vae, self.mesh
        dtype = jnp.dtype(str(self.dtype).removeprefix("torch."))
        layout = ActivationLayout(mesh, ("data",), ("rows",)) if mesh.size > 1 else None
        # Pixels stay within 1/255 (docs/decisions.md); on GPUs "high" would be a tenth as exact.
        products = "high" if vae.devices.platform == "tpu" else "highest"
        half = as_jax_function(
            vae.module,
            decode if program.startswith("decode") else encode_moments,
            replacements=replacements(layout, vae.devices.platform, vae.operations),
            finish=partial(finish, layout=layout, platform=vae.devices.platform),
        )

        def compute(parameters: Parameters, given: Array) -> Any:
            with products_for(dtype, of_float32=products):
                computed = half(parameters, given.astype(dtype)).astype(jnp.float32)
            return to_pixels(computed) if program == "decode_whole" else computed

        return compute

    def compute(self, program: Program, array: np.ndarray, *, warm_up: bool = False) -> Any:
        with self.report.part("host_to_device"):
            there = self.vae.devices.put(array, split_latents(self.mesh))
        arguments = self.vae.parameters, there
        key = program, array.shape
        if key not in self.used:
            self.used[key] = self._compiled(key)
            if warm_up:
                with self.report.part("warm_up"):
                    jax.block_until_ready(self.used[key](*arguments))
        compiled = self.used[key]
        with self._running():
            result = jax.block_until_ready(compiled(*arguments))
        self.report.count_flops(self._counted, (compiled.flops or 0.0) * self.mesh.size)
        with self.report.part("device_to_host"):
            return jax.tree.map(fetch, result)

    def _compiled(self, key: ProgramKey) -> CompiledProgram:
        if key not in self.programs:
            to_compile, module = self._to_compile(*key), self.vae.module
            traced_in = compiled_in(module, self.mesh, self.vae.operations)
            self.programs[key] = compile_program(
                partial(lower_stored, to_compile, traced_in, module, self.report),
                to_compile.name,
                self.report,
            )
        return self.programs[key]

    def facts(self) -> dict[str, Any]:
        return device_facts(self.mesh, self.dtype)

    def profiler(self, folder: Path) -> JaxProfiler:
        return JaxProfiler(folder, None, self.report, self.used, self.module)


def decode(vae: Any, latents: Any) -> Any:
    """diffusers' decoding, [B, C, h, w] as the VAE takes them to [B, 3, H, W]."""
    return vae.decode(latents, return_dict=False)[0]


def to_pixels(images: Array) -> tuple[Array, Array]:
    """As `runner.to_pixels`, within a program: less to fetch from the devices."""
    pixels = jnp.round(jnp.clip(images / 2 + 0.5, 0, 1) * 255).astype(jnp.uint8)
    return pixels.transpose(0, 2, 3, 1), jnp.isfinite(images).all()
