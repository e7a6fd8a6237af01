"""The compiled denoising program, for TPU, GPU or CPU.

Only shapes, dtype and the mesh recompile. On accelerators one call runs a range of steps inside a
loop; on CPUs one call runs one step, because XLA on CPU runs a loop's body many times slower than
the same program called from the host.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import Array
from jax.sharding import Mesh

from common.compute.devices import Devices, device_facts, fetch
from common.compute.fast_ops import finish, norm_weights, products_for, replacements
from common.compute.jax_profiler import JaxProfiler
from common.compute.jax_start import CompiledProgram, compile_program
from common.compute.sharding import (
    ActivationLayout,
    replicated,
    rows_of_levels,
    split_latents,
    split_weight,
)
from common.compute.torchax_runtime import Parameters, as_jax_function, to_numpy
from common.files.report import StageReport
from common.models.submodules import prompt_projections
from common.runs.generation import RunOptions
from common.sampling.denoiser import Denoiser, Guidance, State, prepare_guidance, prepare_schedule

HIGHEST = jax.lax.Precision.HIGHEST


def prepare_model(
    unet: torch.nn.Module, parameters: Parameters, prompt_embeds: Array, operations: str
) -> tuple[Parameters, dict[str, Array]]:
    """What is the same in all steps: norms' weights in float32, projections of the prompts.

    Returns the parameters to use and the outputs of submodules by their names, each [N, L, C].
    """
    if operations == "torchax":
        return parameters, {}
    in_float32 = norm_weights(unet)
    given = {}
    for name, module in prompt_projections(unet).items():
        own = {kind: parameters[f"{name}.{kind}"] for kind, _ in module.named_parameters()}
        with jax.named_scope(name), products_for(prompt_embeds.dtype):
            projected = as_jax_function(module)(own, prompt_embeds)
        # On CPUs 16-bit weights are kept in float32.
        given[name] = projected.astype(prompt_embeds.dtype)
    parameters = {
        name: array.astype(jnp.float32) if name in in_float32 else array
        for name, array in parameters.items()
    }
    return parameters, given


def predict(
    unet: Callable[..., Any],
    parameters: Parameters,
    given: dict[str, Array],
    model_input: Array,
    timestep: Array,
    conditions: dict[str, Array],
    guidance: dict[str, Array],
) -> Array:
    """One model evaluation with guidance. [B, C, h, w] float32 to the same.

    Both halves are computed where `conditions` holds two rows for each image. Guidance is Ho &
    Salimans 2022, eq. 6; rescaling is Lin et al. 2023, sec. 3.4 (diffusers' `rescale_noise_cfg`).
    """
    prompt_embeds = conditions["prompt_embeds"]
    dtype = prompt_embeds.dtype
    halves = len(prompt_embeds) // len(model_input)
    repeated = jnp.repeat(model_input, halves, axis=0)  # [2B, C, h, w]
    added = {key: conditions[key] for key in ("text_embeds", "time_ids") if key in conditions}
    with products_for(dtype):
        output = unet(
            parameters,
            repeated.astype(dtype),
            timestep,
            given=given,
            encoder_hidden_states=prompt_embeds,
            timestep_cond=conditions.get("timestep_cond"),
            added_cond_kwargs=added or None,
            return_dict=False,
        )[0].astype(jnp.float32)
    if halves == 1:
        return output
    output = output.reshape(-1, 2, *model_input.shape[1:])
    negative, positive = output[:, 0], output[:, 1]
    guided = negative + guidance["guidance_scale"] * (positive - negative)
    axes = tuple(range(1, guided.ndim))
    rescale = guidance["guidance_rescale"]
    ratio = jnp.std(positive, axes, keepdims=True) / jnp.std(guided, axes, keepdims=True)
    return jnp.where(rescale > 0, rescale * guided * ratio + (1 - rescale) * guided, guided)


def denoise_step(
    unet: Callable[..., Any],
    parameters: Parameters,
    given: dict[str, Array],
    state: tuple[Array, Array],
    arguments: dict[str, Any],
    i: Array,
) -> tuple[Array, Array]:
    """One model evaluation, guidance and the scheduler's update, as a pure function."""
    latents, history = state  # [B, C, h, w], [1 + S, B, C, h, w]
    schedule = arguments["schedule"]
    output = predict(
        unet,
        parameters,
        given,
        latents * schedule["input_scales"][i],
        schedule["timesteps"][i],
        arguments["conditions"],
        schedule,
    )
    history = history.at[i + 1].set(output)
    latents = jnp.tensordot(schedule["coefficients"][i], history, 1, precision=HIGHEST)
    latents += jnp.tensordot(
        schedule["noise_coefficients"][i], arguments["noises"], 1, precision=HIGHEST
    )
    return latents, history


class JaxDenoiser(Denoiser):
    """The UNet on the devices of a mesh, and the compiled programs for one shape of groups."""

    ranges_ahead = 1

    def __init__(
        self,
        unet: Any,
        parameters: Parameters,
        mesh: Mesh,
        devices: Devices,
        options: RunOptions,
        report: StageReport,
    ) -> None:
        """
        Args:
            unet: diffusers' module, for its code.
            parameters: its weights on the devices of the mesh.
            devices: those of the mesh; for ones that are not there, programs can only be lowered.
        """
        super().__init__(unet, options, report)
        self.parameters = parameters
        self.mesh = mesh
        self.devices_of_images = mesh.shape["data"]
        self.platform = devices.platform
        # Weights that are spread over the devices, and where they would lie else.
        placed = {name: split_weight(mesh, name, a.shape) for name, a in parameters.items()}
        self.spread = {n: own for n, own in placed.items() if parameters[n].sharding != own}
        self.loops_on_device = self.platform != "cpu" or options.steps_per_call is not None
        self.operations = options.operations
        self.put = devices.put
        self.compiled: dict[Any, CompiledProgram] = {}

    def _put(self, conditions: dict[bool, dict[str, torch.Tensor]], guidance: Guidance) -> None:
        self.conditions = {
            guided: self.put(
                {name: to_numpy(tensor) for name, tensor in each.items()},
                self.layout(guided).batch_sharding(),
            )
            for guided, each in conditions.items()
        }
        if self.tables is None:
            self.guidance = self.put(prepare_guidance(guidance), replicated(self.mesh))
            return
        self.noises = self.put(self.noise.noises, split_latents(self.mesh, axis=1))
        self.schedule = self.put(prepare_schedule(self.tables, guidance), replicated(self.mesh))

    def _restore(self, latents: np.ndarray, history: np.ndarray, step: int) -> State:
        return (
            self.put(latents, split_latents(self.mesh)),
            self.put(history, split_latents(self.mesh, axis=1)),
            # The next step stays on the devices, so that no step waits for the host.
            self.put(np.int32(step), replicated(self.mesh)),
        )

    def _fetch(self, array: Array) -> np.ndarray:
        return fetch(array)

    def freed_half(self) -> str | None:
        if self.mesh.shape["cfg"] > 1 and False in self.kinds:
            return self.layout(guided=False).freed_half()
        return None

    def layout(self, guided: bool) -> ActivationLayout:
        """How the UNet's activations are split for the group's shapes."""
        levels = rows_of_levels(self.latent_shape[1], len(self.unet.config.block_out_channels))
        return ActivationLayout.of(self.mesh, guided=guided, rows_of_levels=levels)

    def _unet_function(self, guided: bool) -> Callable[..., Any]:
        """The UNet as a jax function, its operations chosen for the mesh and the platform."""
        layout = self.layout(guided) if self.mesh.size > 1 else None
        function = as_jax_function(
            self.unet,
            replacements=replacements(layout, self.platform, self.operations),
            finish=partial(finish, layout=layout, platform=self.platform),
        )

        def unet(parameters: Parameters, sample: Array, *args: Any, **kwargs: Any) -> Any:
            return function(self._gather(parameters, sample), sample, *args, **kwargs)

        return unet

    def _gather(self, parameters: Parameters, after: Array) -> Parameters:
        """The weights, those that are spread over the devices whole.

        They are gathered when `after` is there: what a step computes, so that no loop gathers them
        beforehand and keeps them. Left to itself, XLA computes convolutions wrongly whose pictures
        and weights are split over the same axis.
        """
        spread = {name: parameters[name] for name in self.spread}
        if spread:
            spread, _ = jax.lax.optimization_barrier((spread, after))
        whole = {
            name: jax.lax.with_sharding_constraint(array, self.spread[name])
            for name, array in spread.items()
        }
        return {**parameters, **whole}

    def compile(self) -> None:
        """Trace and compile the programs that the group needs, each once for its shapes."""
        for guided in self.kinds:
            key = self._program_key(guided)
            if key not in self.compiled:
                with self.report.part("trace"):
                    lowered = self.lower(guided)
                self.compiled[key] = compile_program(
                    lowered, self._program_name(guided), self.report
                )

    def _program_key(self, guided: bool) -> Any:
        """Everything about a group that is compiled in."""
        shapes = tuple((name, array.shape) for name, array in self.conditions[guided].items())
        size = None if self.tables is None else len(self.tables.timesteps)
        return guided, size, len(self.seeds), self.latent_shape, shapes

    def _program_name(self, guided: bool) -> str:
        does = "predict" if self.tables is None else "denoise"
        return f"{does}_{'guided' if guided else 'conditional'}"

    def lower(self, guided: bool) -> Any:
        """Trace the program for the group's shapes: with guidance, or the conditional half."""
        name = self._program_name(guided)
        unet = self._unet_function(guided)
        if self.tables is None:
            program = jax.jit(_named(name, partial(self._predict_by, unet)))
            zeros = np.zeros((len(self.seeds), *self.latent_shape), np.float32)
            return program.lower(*self._predict_arguments(zeros, 0.0, guided))
        latents, history, step = self.state
        current = latents, history
        shardings = jax.tree.map(lambda array: array.sharding, (current, step))
        function = self._denoise_range if self.loops_on_device else self._denoise_one
        program = jax.jit(
            _named(name, partial(function, unet)),
            donate_argnums=1,
            out_shardings=shardings,
        )
        index = (np.int32(0),) * (2 if self.loops_on_device else 1)
        return program.lower(self.parameters, current, self._arguments(guided), *index)

    def _prepare_model(
        self, parameters: Parameters, prompt_embeds: Array
    ) -> tuple[Parameters, dict[str, Array]]:
        return prepare_model(self.unet, parameters, prompt_embeds, self.operations)

    def _denoise_one(
        self,
        unet: Callable[..., Any],
        parameters: Parameters,
        state: tuple[Array, Array],
        arguments: dict[str, Any],
        i: Array,
    ) -> tuple[tuple[Array, Array], Array]:
        """One step. Returns the state, and the next step as something to wait for."""
        prompt_embeds = arguments["conditions"]["prompt_embeds"]
        parameters, given = self._prepare_model(parameters, prompt_embeds)
        return denoise_step(unet, parameters, given, state, arguments, i), i + 1

    def _denoise_range(
        self,
        unet: Callable[..., Any],
        parameters: Parameters,
        state: tuple[Array, Array],
        arguments: dict[str, Any],
        start: Array,
        stop: Array,
    ) -> tuple[tuple[Array, Array], Array]:
        """The steps start ≤ i < stop in a loop on the device. Returns as `_denoise_one` does."""
        prompt_embeds = arguments["conditions"]["prompt_embeds"]
        parameters, given = self._prepare_model(parameters, prompt_embeds)

        def body(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
            return denoise_step(unet, parameters, given, state, arguments, i)

        return jax.lax.fori_loop(start, stop, body, state), stop

    def _predict_by(
        self,
        unet: Callable[..., Any],
        parameters: Parameters,
        model_input: Array,
        timestep: Array,
        conditions: dict[str, Array],
        guidance: dict[str, Array],
    ) -> Array:
        """One model evaluation, for a scheduler that steps on the host."""
        parameters, given = self._prepare_model(parameters, conditions["prompt_embeds"])
        return predict(unet, parameters, given, model_input, timestep, conditions, guidance)

    def _arguments(self, guided: bool) -> dict[str, Any]:
        return {
            "conditions": self.conditions[guided],
            "noises": self.noises,
            "schedule": self.schedule,
        }

    def _predict_arguments(self, model_input: np.ndarray, timestep: float, guided: bool) -> Any:
        return (
            self.parameters,
            self.put(model_input, split_latents(self.mesh)),
            np.float32(timestep),
            self.conditions[guided],
            self.guidance,
        )

    def _predict(self, model_input: torch.Tensor, timestep: float, guided: bool) -> torch.Tensor:
        arguments = self._predict_arguments(model_input.numpy(), timestep, guided)
        output = self.compiled[self._program_key(guided)](*arguments)
        return torch.from_numpy(fetch(output).copy())

    def _start_steps(self, state: State, steps: range, guided: bool) -> tuple[State, Array]:
        program, arguments = self.compiled[self._program_key(guided)], self._arguments(guided)
        latents, history, step = state
        current = latents, history
        if self.loops_on_device:
            stop = np.int32(steps.stop)
            current, step = program(self.parameters, current, arguments, step, stop)
        else:
            for _ in steps:
                current, step = program(self.parameters, current, arguments, step)
        return (*current, step), step

    def _wait_for(self, done: Any) -> None:
        jax.block_until_ready(done)

    def flops(self, guided: bool) -> float:
        return (self.compiled[self._program_key(guided)].flops or 0.0) * self.mesh.size

    def facts(self) -> dict[str, Any]:
        return device_facts(self.mesh, self.dtype)

    def profiler(self, folder: Path, steps: range) -> JaxProfiler:
        return JaxProfiler(folder, steps, self.report, self.compiled, self.unet)


def _named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a program the name under which compile logs and traces show it."""

    def program(*arguments: Any) -> Any:
        return function(*arguments)

    program.__name__ = program.__qualname__ = name
    return program
