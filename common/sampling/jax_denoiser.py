"""The compiled denoising program, for TPU, GPU or CPU.

Only shapes, dtype and the mesh recompile. On accelerators one call runs a range of steps inside a
loop; on CPUs one call runs one step, because XLA on CPU runs a loop's body many times slower than
the same program called from the host.
"""

from collections.abc import Callable, MutableMapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import Array
from jax.sharding import NamedSharding

from common.compute.clock import StageReport
from common.compute.devices import ModelOnDevices, device_facts, fetch
from common.compute.fast_ops import finish, norm_weights, products_for, replacements
from common.compute.jax_profiler import JaxProfiler
from common.compute.options import RunOptions
from common.compute.program_store import ToCompile, lower_stored
from common.compute.programs import CompiledProgram, compile_program, compiled_in
from common.compute.sharding import (
    ActivationLayout,
    replicated,
    rows_of_levels,
    split_latents,
    split_weight,
)
from common.compute.torchax_runtime import Parameters, as_jax_function, to_numpy
from common.conditions.prepare import unet_call, unet_sample
from common.models.submodules import prompt_projections
from common.sampling.denoiser import Conditions, Denoiser, State, prepare_schedule
from common.sampling.step_plan import StepProgram

Programs = MutableMapping[Any, CompiledProgram]
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


def denoise_step(
    predict: Callable[..., Array], state: tuple[Array, Array], arguments: dict[str, Any], i: Array
) -> tuple[Array, Array]:
    """One model evaluation, guidance and the scheduler's update, as a pure function.

    Args:
        predict: the combined prediction of (sample, timestep, arguments).
    """
    latents, history = state  # [B, C, h, w], [R, B, C, h, w]
    tables = arguments["schedule"]
    by_image = tables["timesteps"].ndim > 1  # whether each image has its own, [B, S, …]
    row = {name: table[:, i] if by_image else table[i] for name, table in tables.items()}

    def of_images(values: Array) -> Array:
        return values[:, None, None, None] if by_image else values

    scaled = latents * of_images(row["input_scales"])
    history = history.at[i + 1].set(predict(scaled, row["timesteps"], arguments))
    latents = weighed(row["coefficients"], history)
    latents += weighed(row["noise_coefficients"], arguments["noises"])
    kept, scales = arguments["kept"], row["kept_scales"]
    stays = of_images(scales[..., 0]) * kept["original"] + of_images(scales[..., 1]) * kept["noise"]
    laid = jnp.where(kept["masks"] >= of_images(row["free_from"]), latents, stays)
    if differences := history.shape[0] - 1 - tables["timesteps"].shape[-1]:  # of soft masks
        history = history.at[i - differences].set(laid - latents)
    return laid, history


def weighed(weights: Array, tensors: Array) -> Array:
    """The sum of tensors [R, B, C, h, w] by weights, [R] or each image's own [B, R]."""
    if weights.ndim == 1:
        return jnp.tensordot(weights, tensors, 1, precision=HIGHEST)
    return jnp.einsum("br,rbchw->bchw", weights, tensors, precision=HIGHEST)


def spread_weights(unet: ModelOnDevices) -> dict[str, NamedSharding]:
    """Weights that are spread over the devices, and where they would lie else."""
    placed = {n: split_weight(unet.mesh, n, a.shape) for n, a in unet.parameters.items()}
    return {n: own for n, own in placed.items() if unet.parameters[n].sharding != own}


class JaxDenoiser(Denoiser):
    """One run's denoising by a UNet on devices, and its compiled programs."""

    ranges_ahead = 1
    takes_several = True

    def __init__(
        self, unet: ModelOnDevices, options: RunOptions, report: StageReport, programs: Programs
    ) -> None:
        """
        Args:
            programs: those compiled before, which differ in nothing else than what keys say.
        """
        super().__init__(unet.module, options, report)
        self.parameters, self.mesh = unet.parameters, unet.mesh
        self.devices_of_images = unet.mesh.shape["data"]
        self.platform, self.operations = unet.devices.platform, unet.operations
        self.put = unet.devices.put
        self.spread = spread_weights(unet)
        self.loops_on_device = self.platform != "cpu" or options.steps_per_call is not None
        self.programs = programs
        self.used: dict[StepProgram, CompiledProgram] = {}  # in this run, whose groups are alike

    def _put(self, told: Conditions) -> None:
        self.told = {
            program: self.put(
                {name: to_numpy(tensor) for name, tensor in each.items()},
                self.layout(program).batch_sharding(),
            )
            for program, each in told.items()
        }
        self.weights = self.put(self.guidance_weights, replicated(self.mesh))
        if self.tables is None:
            return
        self.noises_there = self.put(self.noises, split_latents(self.mesh, axis=1))
        self.kept = self.put(self.kept_area.arrays(), split_latents(self.mesh))
        self.schedule = self.put(prepare_schedule(self.tables), replicated(self.mesh))

    def _restore(self, latents: np.ndarray, history: np.ndarray, step: int) -> State:
        return (
            self.put(latents, split_latents(self.mesh)),
            self.put(history, split_latents(self.mesh, axis=1)),
            # The next step stays on the devices, so that no step waits for the host.
            self.put(np.int32(step), replicated(self.mesh)),
        )

    def _copied(self, latents: Array) -> Array:
        return jnp.copy(latents)

    def _fetch(self, array: Array) -> np.ndarray:
        return fetch(array)

    def unguided_in_words(self) -> str | None:
        alone = [program for program in self.plan.programs() if len(program.predictions) == 1]
        if self.mesh.shape["cfg"] > 1 and alone:
            return self.layout(alone[0]).cfg_devices_do()
        return None

    def layout(self, program: StepProgram) -> ActivationLayout:
        """How the UNet's activations are split for the group's shapes."""
        levels = rows_of_levels(self.latent_shape[1], len(self.unet.config.block_out_channels))
        return ActivationLayout.of(
            self.mesh, predictions=len(program.predictions), rows_of_levels=levels
        )

    def _unet_function(self, program: StepProgram) -> Callable[..., Any]:
        """The UNet as a jax function, its operations chosen for the mesh and the platform."""
        layout = self.layout(program) if self.mesh.size > 1 else None
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
        for program in self.plan.programs():
            key = self._program_key(program)
            if key not in self.programs:
                self.programs[key] = compile_program(
                    partial(self.lower_stored, program), self._program_name(program), self.report
                )
            self.used[program] = self.programs[key]

    def _program_key(self, program: StepProgram) -> Any:
        """Everything about a group that is compiled in."""
        shapes = tuple((name, array.shape) for name, array in self.told[program].items())
        conditions = tuple(condition.compiled_in() for condition in self.conditions)
        sizes = None if self.tables is None else self.tables.coefficients.shape
        asked = self.loops_on_device, len(self.seeds), self.latent_shape, sizes
        spread = frozenset(self.spread.items())  # their order is a file's
        return program, type(self.guidance), conditions, shapes, asked, spread

    def lower(self, program: StepProgram) -> Any:
        """Trace a program for the group's shapes."""
        return self._to_compile(program).lower()

    def lower_stored(self, program: StepProgram) -> Any:
        """The same by way of the store of traced programs."""
        traced_in = (
            compiled_in(self.unet, self.mesh, self.operations),
            self._program_key(program),
            tuple(type(condition) for condition in self.conditions),  # whose code is traced
        )
        return lower_stored(self._to_compile(program), traced_in, self.unet, self.report)

    def _program_name(self, program: StepProgram) -> str:
        return f"{'predict' if self.tables is None else 'denoise'}_{program.kind}"

    def _to_compile(self, program: StepProgram) -> ToCompile:
        """A program for the group's shapes."""
        name = self._program_name(program)
        if self.tables is None:
            zeros = np.zeros((len(self.seeds), *self.latent_shape), np.float32)
            return ToCompile(
                name=name,
                function=self._predicting(program),
                arguments=self._predict_arguments(zeros, 0.0, program),
            )
        latents, history, step = self.state
        current = latents, history
        steps = self._range_of_steps if self.loops_on_device else self._one_step
        index = (np.int32(0),) * (2 if self.loops_on_device else 1)
        return ToCompile(
            name=name,
            function=steps(self._predicting(program)),
            arguments=(self.parameters, current, self._arguments(program), *index),
            donated=1,
            out_shardings=jax.tree.map(lambda array: array.sharding, (current, step)),
        )

    def _predicting(self, program: StepProgram) -> Callable[..., Array]:
        """One model evaluation with guidance, [B, C, h, w] float32 to the same.

        A function of (parameters, sample, timestep, arguments, prepared), where `prepared` is what
        `_prepare` gives once for all steps of a call.
        """
        unet, predictions = self._unet_function(program), program.predictions

        def predict(
            parameters: Parameters,
            sample: Array,
            timestep: Array,
            arguments: dict[str, Any],
            prepared: tuple[Parameters, dict[str, Array]] | None = None,
        ) -> Array:
            told = arguments["conditions"]
            parameters, given = prepared or self._prepare(parameters, arguments)
            dtype = told["prompt_embeds"].dtype
            repeated = jnp.repeat(sample, len(predictions), axis=0)  # [N, C, h, w]
            if timestep.ndim:  # each image's own
                timestep = jnp.repeat(timestep, len(predictions))
            with products_for(dtype):
                output = unet(
                    parameters,
                    unet_sample(repeated.astype(dtype), told, jnp),
                    timestep,
                    given=given,
                    **unet_call(self.conditions, told),
                )[0].astype(jnp.float32)
            output = output.reshape(-1, len(predictions), *sample.shape[1:])
            predicted = {name: output[:, k] for k, name in enumerate(predictions)}
            combined: Array = self.guidance.combine(predicted, arguments["guidance"], jnp)
            return combined

        return predict

    def _prepare(
        self, parameters: Parameters, arguments: dict[str, Any]
    ) -> tuple[Parameters, dict[str, Array]]:
        attended = unet_call(self.conditions, arguments["conditions"])["encoder_hidden_states"]
        return prepare_model(self.unet, parameters, attended, self.operations)

    def _one_step(self, predict: Callable[..., Array]) -> Callable[..., Any]:
        """One step. The program returns the state, and the next step as something to wait for."""

        def step(
            parameters: Parameters, state: tuple[Array, Array], arguments: dict[str, Any], i: Array
        ) -> tuple[tuple[Array, Array], Array]:
            return denoise_step(partial(predict, parameters), state, arguments, i), i + 1

        return step

    def _range_of_steps(self, predict: Callable[..., Array]) -> Callable[..., Any]:
        """The steps start ≤ i < stop in a loop on the device; returns as `_one_step` does."""

        def steps(
            parameters: Parameters,
            state: tuple[Array, Array],
            arguments: dict[str, Any],
            start: Array,
            stop: Array,
        ) -> tuple[tuple[Array, Array], Array]:
            prepared = self._prepare(parameters, arguments)
            own = partial(predict, parameters, prepared=prepared)

            def body(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
                return denoise_step(own, state, arguments, i)

            return jax.lax.fori_loop(start, stop, body, state), stop

        return steps

    def _arguments(self, program: StepProgram) -> dict[str, Any]:
        return {
            "conditions": self.told[program],
            "guidance": self.weights,
            "noises": self.noises_there,
            "kept": self.kept,
            "schedule": self.schedule,
        }

    def _predict_arguments(
        self, sample: np.ndarray, timestep: float, program: StepProgram
    ) -> tuple[Any, ...]:
        return (
            self.parameters,
            self.put(sample, split_latents(self.mesh)),
            np.float32(timestep),
            {"conditions": self.told[program], "guidance": self.weights},
        )

    def _predict(
        self, model_input: torch.Tensor, timestep: float, program: StepProgram
    ) -> torch.Tensor:
        arguments = self._predict_arguments(model_input.numpy(), timestep, program)
        output = self.used[program](*arguments)
        return torch.from_numpy(fetch(output).copy())

    def _start_steps(self, state: State, steps: range, program: StepProgram) -> tuple[State, Array]:
        compiled, arguments = self.used[program], self._arguments(program)
        latents, history, step = state
        current = latents, history
        if self.loops_on_device:
            stop = np.int32(steps.stop)
            current, step = compiled(self.parameters, current, arguments, step, stop)
        else:
            for _ in steps:
                current, step = compiled(self.parameters, current, arguments, step)
        return (*current, step), step

    def _wait_for(self, done: Any) -> None:
        jax.block_until_ready(done)

    def flops(self, program: StepProgram) -> float:
        return (self.used[program].flops or 0.0) * self.mesh.size

    def compiled_for(self) -> Any:
        weights = id(self.parameters)  # of one model on its devices
        return weights, compiled_in(self.unet, self.mesh, self.operations), self.steps_per_call

    def facts(self) -> dict[str, Any]:
        return device_facts(self.mesh, self.dtype)

    def profiler(self, folder: Path, steps: range) -> JaxProfiler:
        return JaxProfiler(folder, steps, self.report, self.used, self.unet)
