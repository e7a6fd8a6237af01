"""The compiled decoding programs: latents to 8-bit pictures, whole or in tiles."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import Array
from jax.sharding import Mesh
from PIL import Image

from common.devices import Devices, fetch
from common.fast_ops import finish, products_for, replacements
from common.jax_profiler import JaxProfiler
from common.jax_setup import CompiledProgram, compile_program
from common.report import Profile, StageReport
from common.sharding import ActivationLayout, split_latents
from common.torchax_runtime import Parameters, as_jax_function

MOST_GRID_PIXELS = 16_000  # a side; WebP ends at 16 383


def unscale_latents(latents: Array, config: dict[str, Any]) -> Array:
    """Undo the VAE's own scaling of its latents, as diffusers' SDXL pipeline does.

    Args:
        latents: [B, C, h, w] float32.
        config: the VAE's config.
    """
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        mean, std = (
            jnp.asarray(values, jnp.float32).reshape(1, -1, 1, 1) for values in (mean, std)
        )
        return latents * std / config["scaling_factor"] + mean
    return latents / config["scaling_factor"]


def to_pixels(images: Array) -> tuple[Array, Array]:
    """[B, 3, H, W] float32 to [B, H, W, 3] uint8, and whether all values were finite.

    diffusers' VaeImageProcessor: denormalize, clamp, to 8 bits by rounding.
    """
    pixels = jnp.round(jnp.clip(images / 2 + 0.5, 0, 1) * 255).astype(jnp.uint8)
    return pixels.transpose(0, 2, 3, 1), jnp.isfinite(images).all()


class Tiles:
    """diffusers' own cutting into overlapping tiles and blending, around a decoder of tiles."""

    def __init__(self, vae: Any) -> None:
        """`vae` gives up its modules; another one has to hold the code of the decoder."""
        self.vae = vae
        self.vae.post_quant_conv = torch.nn.Identity()

    @property
    def size(self) -> int:
        """The most rows and columns of latents in a tile."""
        return int(self.vae.tile_latent_min_size)

    def rows(self, height: int) -> list[int]:
        """The rows of every tile of latents with so many rows, from above to below."""
        step = int(self.size * (1 - self.vae.tile_overlap_factor))
        return [min(self.size, height - first) for first in range(0, height, step)]

    def decode(self, scaled: np.ndarray, decode: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """[B, C, h, w] to [B, 3, H, W], by a function that decodes a tile of that form."""
        self.vae.decoder = _AsModule(decode)
        images = self.vae.tiled_decode(torch.from_numpy(scaled), return_dict=False)[0]
        return np.asarray(images.numpy())


class _AsModule(torch.nn.Module):
    """A function of numpy arrays where diffusers wants a module."""

    def __init__(self, function: Callable[[np.ndarray], np.ndarray]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.function(x.numpy()).copy())


class Decoder:
    """The VAE on its devices, and its compiled programs: one, or one for each shape of a tile."""

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
        self.config = vae.config
        self.dtype = parameters["decoder.conv_in.weight"].dtype
        self.parameters = parameters
        self.mesh = mesh
        self.devices = devices
        self.tiles = tiles
        self.report = report
        self.compiled: dict[tuple[int, ...], CompiledProgram] = {}
        self._counted = "run"  # the part of the report that the programs' seconds count as
        self._run_seconds = 0.0
        layout = ActivationLayout(mesh, ("data",), ("rows",)) if mesh.size > 1 else None
        self.module = vae
        self.vae = as_jax_function(
            vae,
            "decode",
            replacements=replacements(layout, devices.platform, operations),
            finish=partial(finish, layout=layout, platform=devices.platform),
        )

    def decode(self, latents: np.ndarray, *, warm_up: bool = False) -> tuple[np.ndarray, bool]:
        """Latents [B, C, h, w] float32 to [B, H, W, 3] uint8, and whether all was finite.

        Args:
            warm_up: run each program once before it is timed, when it is compiled.
        """
        if self.tiles is None:
            pixels, finite = self._run(latents, warm_up)
            return pixels, bool(finite)
        with self.report.part("blending"):
            scaled = np.array(unscale_latents(jnp.asarray(latents), self.config))
            images = self.tiles.decode(scaled, lambda tile: self._run(tile, warm_up))
            pixels, finite = jax.jit(to_pixels)(images)
            return np.asarray(pixels), bool(finite)

    def repeat(self, latents: np.ndarray, times: int) -> None:
        """Measure the programs some times more."""
        for _ in range(times):
            self._run_seconds = 0.0
            with self.counting_as("repeats"):
                self.decode(latents)
            self.report.repeats.append(self._run_seconds)

    def profile(self, latents: np.ndarray, profiler: JaxProfiler) -> Profile:
        """Decode once more under the profiler."""
        profiler.start()
        with profiler.step(0), self.counting_as("profile"):
            self.decode(latents)
        profiler.stop()
        return profiler.result(self.compiled.values(), self.module)

    @contextmanager
    def counting_as(self, part: str) -> Iterator[None]:
        """Report the programs' seconds as another part than `run`."""
        self._counted = part
        with self.report.part(part):
            yield
        self._counted = "run"

    def lower(self, shape: tuple[int, ...]) -> Any:
        """Trace the program for latents [B, C, h, w], of whole pictures or of tiles."""
        latents = self.devices.describe(shape, "float32", split_latents(self.mesh))
        return jax.jit(self._program()).lower(self.parameters, latents)

    def _program(self) -> Callable[..., Any]:
        return self.decode_whole if self.tiles is None else self.decode_tile

    def decode_whole(self, parameters: Parameters, latents: Array) -> tuple[Array, Array]:
        """The program of pictures that are decoded whole."""
        return to_pixels(self.decode_tile(parameters, unscale_latents(latents, self.config)))

    def decode_tile(self, parameters: Parameters, scaled: Array) -> Array:
        """[B, C, h, w] as the VAE takes them to [B, 3, H, W] float32."""
        with products_for(self.dtype):
            images = self.vae(parameters, scaled.astype(self.dtype), return_dict=False)[0]
        return images.astype(jnp.float32)

    def _run(self, latents: np.ndarray, warm_up: bool) -> Any:
        """Run the program for the latents' shape, which is compiled the first time."""
        with self.report.part("host_to_device"):
            latents_there = self.devices.put(latents, split_latents(self.mesh))
        if latents.shape not in self.compiled:
            with self.report.part("trace"):
                lowered = self.lower(latents.shape)
            self.compiled[latents.shape] = compile_program(
                lowered, self._program().__name__, self.report
            )
            if warm_up:
                with self.report.part("warm_up"):
                    program = self.compiled[latents.shape]
                    jax.block_until_ready(program(self.parameters, latents_there))
        program = self.compiled[latents.shape]
        with self.report.part(self._counted):
            began = time.perf_counter()
            result = jax.block_until_ready(program(self.parameters, latents_there))
            self._run_seconds += time.perf_counter() - began
        self.report.count_flops(self._counted, (program.flops or 0.0) * self.mesh.size)
        with self.report.part("device_to_host"):
            return jax.tree.map(fetch, result)


def shrink(picture: np.ndarray, side: int) -> np.ndarray:
    """A picture [H, W, 3] uint8 with sides of at most `side` pixels."""
    image = Image.fromarray(picture)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return np.asarray(image)


def make_grid(pictures: np.ndarray) -> np.ndarray:
    """Lay [B, H, W, 3] pictures out row by row, as square as possible, the rest white.

    They are shrunk where the grid would be larger than the formats for pictures can hold.
    """
    columns = int(np.ceil(np.sqrt(len(pictures))))
    if columns > 1 and columns * max(pictures.shape[1:3]) > MOST_GRID_PIXELS:
        pictures = np.stack([shrink(each, MOST_GRID_PIXELS // columns) for each in pictures])
    count, height, width, channels = pictures.shape
    rows = int(np.ceil(count / columns))
    grid = np.full((rows * columns, height, width, channels), 255, np.uint8)
    grid[:count] = pictures
    laid_out = grid.reshape(rows, columns, height, width, channels).transpose(0, 2, 1, 3, 4)
    return laid_out.reshape(rows * height, columns * width, channels)
