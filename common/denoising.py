"""The compiled denoising program and the driver that calls it.

Everything about the sampler is data: scheduler tables, timesteps, noises, guidance and the range of
steps are arguments, so only shapes, dtype and the mesh recompile. On accelerators one call runs a
range of steps inside a loop; on CPUs one call runs one step, because XLA on CPU runs a loop's body
many times slower than the same program called from the host.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import Array
from jax.sharding import Mesh

from common.report import StageReport
from common.scheduler_tables import SchedulerTables
from common.sharding import replicated, split_images
from common.torchax_runtime import Parameters, as_jax_function, parameters_of, to_numpy

HIGHEST = jax.lax.Precision.HIGHEST


@dataclass(frozen=True, kw_only=True)
class NoiseBatch:
    """What is drawn for a batch of B images, float32, by one generator per image."""

    initial_latents: np.ndarray  # [B, C, h, w], scaled by the scheduler's initial_noise_scale
    noises: np.ndarray  # [S, B, C, h, w]; zeros after the K that the scheduler draws


def prepare_noise(
    seeds: Sequence[int], tables: SchedulerTables, latent_shape: tuple[int, int, int]
) -> NoiseBatch:
    """Draw the initial latents and the scheduler's noises as diffusers does.

    Each image has a `torch.Generator` of its own on the CPU, which draws [1, C, h, w] in float32:
    first the initial latents, then the noises in the order in which the scheduler asks.
    """
    size = len(tables.timesteps)
    initial = np.empty((len(seeds), *latent_shape), np.float32)
    noises = np.zeros((size, len(seeds), *latent_shape), np.float32)
    for index, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        draws = [
            torch.randn((1, *latent_shape), generator=generator)[0].numpy()
            for _ in range(1 + tables.noises)
        ]
        initial[index] = draws[0] * np.float32(tables.initial_noise_scale)
        for k, noise in enumerate(draws[1:]):
            noises[k, index] = noise
    return NoiseBatch(initial_latents=initial, noises=noises)


def prepare_state(noise: NoiseBatch, mesh: Mesh) -> tuple[Array, Array]:
    """Latents [B, C, h, w] and history [1 + S, B, C, h, w] before the first step.

    The history holds the initial latents and the model's outputs so far.
    """
    history = np.zeros((1 + len(noise.noises), *noise.initial_latents.shape), np.float32)
    history[0] = noise.initial_latents
    return (
        jax.device_put(noise.initial_latents, split_images(mesh)),
        jax.device_put(history, split_images(mesh, axis=1)),
    )


def prepare_arguments(
    embeddings: Mapping[str, torch.Tensor],
    noise: NoiseBatch,
    tables: SchedulerTables,
    guidance_scale: float,
    time_ids: Sequence[int] | None,
    dtype: Any,
    mesh: Mesh,
) -> dict[str, Any]:
    """Put everything but the weights and the state on the devices.

    Args:
        embeddings: stage 1's tensors, one row per image: [B, L, D] and, pooled, [B, E].
        time_ids: SDXL's six size conditions, or None; float32 on the devices, because bfloat16
            rounds them.
        dtype: the model's dtype.
    """
    guided = guidance_scale > 1
    halves = ("negative_prompt_embeds", "prompt_embeds")[0 if guided else 1 :]
    # Halves lie beside each other, [image, half]: a batch split over devices stays whole there.
    context = np.stack([to_numpy(embeddings[half]) for half in halves], 1)
    conditions = {"prompt_embeds": _flat(context).astype(dtype)}  # [2B, L, D]
    if time_ids is not None:
        pooled = ("negative_pooled_prompt_embeds", "pooled_prompt_embeds")[0 if guided else 1 :]
        text_embeds = np.stack([to_numpy(embeddings[half]) for half in pooled], 1)
        conditions["text_embeds"] = _flat(text_embeds).astype(dtype)  # [2B, E]
        conditions["time_ids"] = np.tile(
            np.array([time_ids], np.float32), (len(conditions["prompt_embeds"]), 1)
        )
    schedule = {
        "timesteps": tables.timesteps,
        "input_scales": tables.input_scales,
        "coefficients": tables.coefficients,
        "noise_coefficients": tables.noise_coefficients,
        "guidance_scale": np.float32(guidance_scale),
    }
    return {
        "conditions": jax.device_put(conditions, split_images(mesh)),
        "noises": jax.device_put(noise.noises, split_images(mesh, axis=1)),
        "schedule": jax.device_put(schedule, replicated(mesh)),
    }


def _flat(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1, *array.shape[2:])


def denoise_step(
    unet: Callable[..., Any],
    guided: bool,
    parameters: Parameters,
    state: tuple[Array, Array],
    arguments: dict[str, Any],
    i: Array,
) -> tuple[Array, Array]:
    """One model evaluation, guidance and the scheduler's update, as a pure function.

    Guidance is Ho & Salimans 2022, eq. 6, as in diffusers' pipelines; without it (`guided` False)
    only the conditional half is computed.
    """
    latents, history = state  # [B, C, h, w], [1 + S, B, C, h, w]
    conditions, schedule = arguments["conditions"], arguments["schedule"]
    dtype = conditions["prompt_embeds"].dtype
    model_input = latents * schedule["input_scales"][i]
    if guided:
        model_input = jnp.repeat(model_input, 2, axis=0)  # [2B, C, h, w]
    added = {key: conditions[key] for key in ("text_embeds", "time_ids") if key in conditions}
    # float32 weights ask for float32 products, which TPUs and GPUs otherwise round.
    with jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default"):
        output = unet(
            parameters,
            model_input.astype(dtype),
            schedule["timesteps"][i],
            encoder_hidden_states=conditions["prompt_embeds"],
            added_cond_kwargs=added or None,
            return_dict=False,
        )[0].astype(jnp.float32)
    if guided:
        output = output.reshape(-1, 2, *latents.shape[1:])
        negative, positive = output[:, 0], output[:, 1]
        output = negative + schedule["guidance_scale"] * (positive - negative)
    history = history.at[i + 1].set(output)
    latents = jnp.tensordot(schedule["coefficients"][i], history, 1, precision=HIGHEST)
    latents += jnp.tensordot(
        schedule["noise_coefficients"][i], arguments["noises"], 1, precision=HIGHEST
    )
    return latents, history


def lower_denoiser(
    unet: Callable[..., Any],
    guided: bool,
    parameters: Parameters,
    state: tuple[Array, Array],
    arguments: dict[str, Any],
    *,
    loops_on_device: bool,
) -> Any:
    """Trace the program for the given arguments; `.compile()` of the result compiles it."""

    def denoise_one(
        parameters: Parameters, state: tuple[Array, Array], arguments: dict[str, Any], i: Array
    ) -> tuple[Array, Array]:
        return denoise_step(unet, guided, parameters, state, arguments, i)

    def denoise_range(
        parameters: Parameters,
        state: tuple[Array, Array],
        arguments: dict[str, Any],
        start: Array,
        stop: Array,
    ) -> tuple[Array, Array]:
        return jax.lax.fori_loop(
            start, stop, lambda i, state: denoise_one(parameters, state, arguments, i), state
        )

    shardings = jax.tree.map(lambda array: array.sharding, state)
    index = np.int32(0)
    if loops_on_device:
        program = jax.jit(denoise_range, donate_argnums=1, out_shardings=shardings)
        return program.lower(parameters, state, arguments, index, index)
    program = jax.jit(denoise_one, donate_argnums=1, out_shardings=shardings)
    return program.lower(parameters, state, arguments, index)


class Denoiser:
    """The UNet on its devices, and the compiled program for one shape of groups.

    For each group: `start`, `compile` (which compiles only the first time), `run`, `latents`.
    """

    def __init__(
        self,
        unet: torch.nn.Module,
        mesh: Mesh,
        guidance_scale: float,
        steps_per_call: int | None,
        report: StageReport,
    ) -> None:
        self.unet = as_jax_function(unet)
        self.dtype = to_numpy(next(unet.parameters())[:0]).dtype
        self.mesh = mesh
        self.guidance_scale = guidance_scale
        self.loops_on_device = jax.default_backend() != "cpu" or steps_per_call is not None
        self.steps_per_call = steps_per_call
        self.report = report
        self.compiled: Any = None
        with report.part("host to device"):
            self.parameters = parameters_of(
                unet, lambda array: jax.device_put(array, replicated(mesh))
            )

    def start(
        self,
        embeddings: Mapping[str, torch.Tensor],
        noise: NoiseBatch,
        tables: SchedulerTables,
        time_ids: Sequence[int] | None,
    ) -> None:
        """Put a group's conditions, noise and tables on the devices."""
        self.evaluations = tables.evaluations
        with self.report.part("host to device"):
            self.state = prepare_state(noise, self.mesh)
            self.arguments = prepare_arguments(
                embeddings, noise, tables, self.guidance_scale, time_ids, self.dtype, self.mesh
            )

    def compile(self) -> None:
        """Trace and compile the program for the group's shapes, once."""
        if self.compiled is not None:
            return
        with self.report.part("trace"):
            lowered = lower_denoiser(
                self.unet,
                self.guidance_scale > 1,
                self.parameters,
                self.state,
                self.arguments,
                loops_on_device=self.loops_on_device,
            )
        with self.report.part("compile"):
            self.compiled = lowered.compile()

    def warm_up(self, steps: int, noise: NoiseBatch) -> None:
        """Run steps on a state of their own, the first time."""
        if steps and "warm-up" not in self.report.seconds:
            with self.report.part("warm-up"):
                state = prepare_state(noise, self.mesh)
                self._run_range(state, 0, min(steps, self.evaluations))

    def run(self) -> Iterator[int]:
        """Run all steps, in ranges. Yields the number of steps after each range."""
        step = self.steps_per_call or (self.evaluations if self.loops_on_device else 1)
        for start in range(0, self.evaluations, step):
            stop = min(start + step, self.evaluations)
            with self.report.part("run"):
                self.state = self._run_range(self.state, start, stop)
            yield stop - start

    def latents(self) -> np.ndarray:
        """The group's latents [B, C, h, w] float32."""
        with self.report.part("device to host"):
            return np.asarray(self.state[0])

    def _run_range(self, state: tuple[Array, Array], start: int, stop: int) -> tuple[Array, Array]:
        """Run the steps start ≤ i < stop and wait for them; `state` is given away."""
        if self.loops_on_device:
            state = self.compiled(
                self.parameters, state, self.arguments, np.int32(start), np.int32(stop)
            )
        else:
            for i in range(start, stop):
                state = self.compiled(self.parameters, state, self.arguments, np.int32(i))
        return jax.block_until_ready(state)
