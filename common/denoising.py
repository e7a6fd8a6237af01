"""The compiled denoising program and the driver that calls it.

Everything about the sampler is data: scheduler tables, timesteps, noises, guidance and the range of
steps are arguments, so only shapes, dtype and the mesh recompile. On accelerators one call runs a
range of steps inside a loop; on CPUs one call runs one step, because XLA on CPU runs a loop's body
many times slower than the same program called from the host.
"""

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers.models.embeddings import get_timestep_embedding
from jax import Array
from jax.sharding import Mesh

from common.config import RunOptions
from common.devices import Devices, fetch
from common.fast_ops import finish, norm_weights, products_for, prompt_projections, replacements
from common.jax_profiler import JaxProfiler
from common.jax_setup import CompiledProgram, compile_program
from common.report import StageReport
from common.sampler import Sampler
from common.scheduler_tables import SchedulerTables
from common.sharding import (
    ActivationLayout,
    replicated,
    rows_of_levels,
    split_latents,
    split_weight,
)
from common.torchax_runtime import Parameters, as_jax_function, to_numpy

HIGHEST = jax.lax.Precision.HIGHEST
RANGES_AHEAD = 1  # handed to the devices beyond the one that runs


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6), under diffusers' names."""

    scale: float
    rescale: float = 0.0
    start: float = 0.0
    end: float = 1.0

    def guided_steps(self, evaluations: int) -> range:
        """The model evaluations that compute the unconditional half as well.

        Like diffusers' `ClassifierFreeGuidance`, int(start·T) ≤ i < int(end·T), with T the number
        of model evaluations; none at a scale of 1 or less, as in diffusers' pipelines.
        """
        if self.scale <= 1:
            return range(0)
        return range(int(self.start * evaluations), int(self.end * evaluations))


@dataclass(frozen=True, kw_only=True)
class NoiseBatch:
    """What is drawn for a batch of B images, float32, by one generator per image."""

    initial_latents: np.ndarray  # [B, C, h, w], scaled by the scheduler's initial_noise_scale
    noises: np.ndarray  # [S, B, C, h, w]; zeros after the K that the scheduler draws


def prepare_noise(
    seeds: Sequence[int],
    sampler: Sampler,
    tables: SchedulerTables,
    latent_shape: tuple[int, int, int],
) -> NoiseBatch:
    """Draw the initial latents and the scheduler's noises as diffusers does.

    Each image has a `torch.Generator` of its own on the CPU: first it draws the initial latents,
    then the scheduler itself, stepped on zeros, draws its noises from it.
    """
    size = len(tables.timesteps)
    initial = np.empty((len(seeds), *latent_shape), np.float32)
    noises = np.zeros((size, len(seeds), *latent_shape), np.float32)
    for index, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        drawn = draw_initial_latents(generator, latent_shape, tables.initial_noise_scale)
        initial[index] = drawn[0].numpy()
        if tables.noises:
            noises[: tables.noises, index] = draw_noises(sampler, seed, generator, latent_shape)
    return NoiseBatch(initial_latents=initial, noises=noises)


def draw_initial_latents(
    generator: torch.Generator, latent_shape: tuple[int, int, int], scale: float
) -> torch.Tensor:
    """One image's initial latents [1, C, h, w] float32, the first that its generator draws."""
    return torch.randn((1, *latent_shape), generator=generator) * scale


def draw_noises(
    sampler: Sampler, seed: int, generator: torch.Generator, latent_shape: tuple[int, int, int]
) -> np.ndarray:
    """Let a scheduler draw all its noises for one image. Returns [K, C, h, w] float32."""
    drawn: list[np.ndarray] = []

    def keep(_: tuple[int, ...], draw: Callable[[], torch.Tensor]) -> torch.Tensor:
        noise = draw()
        drawn.append(noise[0].numpy())
        return noise

    zeros = torch.zeros(1, *latent_shape)
    timesteps = sampler.restart([seed])
    with sampler.hearing_noises(keep):
        for timestep in timesteps:
            sampler.scale_model_input(zeros, timestep)
            sampler.step(zeros, timestep, zeros, [generator])
    return np.stack(drawn)


def prepare_state(noise: NoiseBatch) -> tuple[np.ndarray, np.ndarray]:
    """Latents [B, C, h, w] and history [1 + S, B, C, h, w] before the first step.

    The history holds the initial latents and the model's outputs so far.
    """
    history = np.zeros((1 + len(noise.noises), *noise.initial_latents.shape), np.float32)
    history[0] = noise.initial_latents
    return noise.initial_latents, history


def prepare_conditions(
    embeddings: Mapping[str, torch.Tensor],
    size_conditions: Mapping[str, Sequence[int]] | None,
    timestep_cond: np.ndarray | None,
    dtype: Any,
    *,
    guided: bool,
) -> dict[str, np.ndarray]:
    """What the UNet is told of each image besides the latents.

    Args:
        embeddings: stage 1's tensors, one row per image: [B, L, D] and, pooled, [B, E].
        size_conditions: SDXL's `time_ids` and `negative_time_ids`, six numbers each; float32 on
            the devices, because bfloat16 rounds them.
        timestep_cond: [1, G], for a UNet that takes the guidance scale as an embedding.
        dtype: the model's dtype.
        guided: both halves of guidance, which lie beside each other, [image, half], so that a
            batch split over devices stays whole there.
    """
    signs = ("negative_", "") if guided else ("",)

    def both_halves(name: str) -> np.ndarray:
        array = np.stack([to_numpy(embeddings[f"{sign}{name}"]) for sign in signs], 1)
        return array.reshape(-1, *array.shape[2:]).astype(dtype)

    conditions = {"prompt_embeds": both_halves("prompt_embeds")}  # [2B, L, D]
    rows = len(conditions["prompt_embeds"])
    if size_conditions is not None:
        conditions["text_embeds"] = both_halves("pooled_prompt_embeds")  # [2B, E]
        time_ids = np.array([size_conditions[f"{sign}time_ids"] for sign in signs], np.float32)
        conditions["time_ids"] = np.tile(time_ids, (rows // len(signs), 1))  # [2B, 6]
    if timestep_cond is not None:
        conditions["timestep_cond"] = np.tile(timestep_cond, (rows, 1)).astype(dtype)
    return conditions


def embed_guidance_scale(scale: float, dimension: int) -> np.ndarray:
    """The guidance scale as distilled UNets (LCM) take it: [1, dimension] float32.

    That of scale − 1 in diffusers' `get_guidance_scale_embedding`, but for the rounding of angles
    of thousands of radians; that one stands in a module that imports text encoders.
    """
    weight = torch.tensor([(scale - 1) * 1000.0])
    embedded = get_timestep_embedding(weight, dimension, downscale_freq_shift=1)
    return np.asarray(embedded.numpy())


def prepare_schedule(tables: SchedulerTables, guidance: Guidance) -> dict[str, np.ndarray]:
    """Tables and guidance, as the program takes them."""
    return {
        "timesteps": tables.timesteps,
        "input_scales": tables.input_scales,
        "coefficients": tables.coefficients,
        "noise_coefficients": tables.noise_coefficients,
        **prepare_guidance(guidance),
    }


def prepare_guidance(guidance: Guidance) -> dict[str, np.ndarray]:
    """Guidance, as the program takes it."""
    return {
        "guidance_scale": np.asarray(guidance.scale, np.float32),
        "guidance_rescale": np.asarray(guidance.rescale, np.float32),
    }


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
            given[name] = as_jax_function(module)(own, prompt_embeds)
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


class Denoiser:
    """The UNet on its devices, and the compiled programs for one shape of groups.

    For each group `start`, then `compile` (which compiles only what is not compiled yet), `run`
    and `latents`. Scheduler, steps and guidance may be others for each group.
    """

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
        self.unet = unet
        self.parameters = parameters
        self.dtype = parameters["conv_in.weight"].dtype
        self.guidance_dimension: int | None = unet.config.time_cond_proj_dim
        self.mesh = mesh
        self.platform = devices.platform
        # Weights that are spread over the devices, and where they would lie else.
        placed = {name: split_weight(mesh, name, a.shape) for name, a in parameters.items()}
        self.spread = {n: own for n, own in placed.items() if parameters[n].sharding != own}
        self.loops_on_device = self.platform != "cpu" or options.steps_per_call is not None
        self.steps_per_call = options.steps_per_call
        self.operations = options.operations
        self.report = report
        self.put = devices.put
        self.compiled: dict[Any, CompiledProgram] = {}
        # (latents [B, C, h, w], history) on the devices; a scheduler on the host has a tensor.
        self.state: Any = None

    def start(
        self,
        embeddings: Mapping[str, torch.Tensor],
        seeds: Sequence[int],
        sampler: Sampler,
        tables: SchedulerTables | None,
        guidance: Guidance,
        size_conditions: Mapping[str, Sequence[int]] | None,
        latent_shape: tuple[int, int, int],
    ) -> None:
        """Put a group's conditions, noises and tables on the devices.

        Args:
            tables: the sampler's; None steps the sampler itself on the host.
        """
        timestep_cond = None
        if self.guidance_dimension is not None:
            # A distilled UNet is told the scale and computes no unconditional half.
            timestep_cond = embed_guidance_scale(guidance.scale, self.guidance_dimension)
            guidance = Guidance(scale=1.0)
        self.sampler, self.tables, self.seeds = sampler, tables, list(seeds)
        self.done, self.at_rest = 0, True
        self.trajectory: list[np.ndarray] = []
        self.latent_shape = latent_shape
        if tables is None:
            self.evaluations = len(sampler.restart(self.seeds))
            self.guidance = self.put(prepare_guidance(guidance), replicated(self.mesh))
        else:
            self.evaluations = tables.evaluations
            with self.report.part("noise"):
                self.noise = prepare_noise(seeds, sampler, tables, latent_shape)
        self.guided = guidance.guided_steps(self.evaluations)
        kinds = {i in self.guided for i in range(self.evaluations)}
        with self.report.part("host_to_device"):
            self.conditions = {
                guided: self.put(
                    prepare_conditions(
                        embeddings, size_conditions, timestep_cond, self.dtype, guided=guided
                    ),
                    self.layout(guided).batch_sharding(),
                )
                for guided in kinds
            }
            if tables is not None:
                self.noises = self.put(self.noise.noises, split_latents(self.mesh, axis=1))
                self.schedule = self.put(prepare_schedule(tables, guidance), replicated(self.mesh))
                self.state = self._first_state()

    def _first_state(self) -> tuple[Array, Array]:
        latents, history = prepare_state(self.noise)
        return (
            self.put(latents, split_latents(self.mesh)),
            self.put(history, split_latents(self.mesh, axis=1)),
        )

    def _step_number(self, step: int) -> Array:
        return self.put(np.int32(step), replicated(self.mesh))

    def frees_a_half(self) -> bool:
        """Whether steps without guidance leave the devices of the other half without their work."""
        return self.mesh.shape["cfg"] > 1 and False in self.conditions

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
        for guided in self.conditions:
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
            program = jax.jit(_named(name, partial(self._predict, unet)))
            return program.lower(*self._predict_arguments(guided, *self._example_input()))
        shardings = (
            jax.tree.map(lambda array: array.sharding, self.state),
            replicated(self.mesh),
        )
        function = self._denoise_range if self.loops_on_device else self._denoise_one
        program = jax.jit(
            _named(name, partial(function, unet)),
            donate_argnums=1,
            out_shardings=shardings,
        )
        index = (np.int32(0),) * (2 if self.loops_on_device else 1)
        return program.lower(self.parameters, self.state, self._arguments(guided), *index)

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

    def _predict(
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

    def _predict_arguments(self, guided: bool, model_input: np.ndarray, timestep: float) -> Any:
        return (
            self.parameters,
            self.put(model_input, split_latents(self.mesh)),
            np.float32(timestep),
            self.conditions[guided],
            self.guidance,
        )

    def _example_input(self) -> tuple[np.ndarray, float]:
        return np.zeros((len(self.seeds), *self.latent_shape), np.float32), 0.0

    def warm_up(self, steps: int) -> None:
        """Run steps of each program on a state of their own."""
        if not steps:
            return
        with self.report.part("warm_up"):
            for guided in self.conditions:
                if self.tables is None:
                    program = self.compiled[self._program_key(guided)]
                    for _ in range(steps):
                        arguments = self._predict_arguments(guided, *self._example_input())
                        jax.block_until_ready(program(*arguments))
                else:
                    started = self._first_state(), self._step_number(0)
                    stop = min(steps, self.evaluations)
                    jax.block_until_ready(self._run_range(*started, range(stop), guided))

    @property
    def can_resume(self) -> bool:
        """Whether `resume` can take a group up again: a scheduler on the host keeps more state."""
        return self.tables is not None

    def resume(self, kept: Mapping[str, torch.Tensor]) -> None:
        """Go on from what `state_to_keep` gave, after `start`."""
        self.done = int(kept["step"])
        self.state = (
            self.put(kept["latents"].numpy(), split_latents(self.mesh)),
            self.put(kept["history"].numpy(), split_latents(self.mesh, axis=1)),
        )
        self.trajectory = [latents.numpy() for latents in kept["trajectory"]]

    def state_to_keep(self) -> dict[str, torch.Tensor]:
        """The group's state; only while the denoiser is `at_rest`."""
        assert self.at_rest and self.can_resume
        with self.report.part("device_to_host"):
            latents, history = (torch.from_numpy(fetch(a).copy()) for a in self.state)
        trajectory = [torch.from_numpy(kept.copy()) for kept in self.trajectory]
        return {
            "step": torch.tensor(self.done),
            "latents": latents,
            "history": history,
            "trajectory": torch.stack(trajectory) if trajectory else torch.empty(0),
        }

    def run(
        self,
        *,
        keep_after: Collection[int] = (),
        rest_after: Collection[int] = (),
        rest: Callable[[], bool] = bool,
        profiler: JaxProfiler | None = None,
    ) -> Iterator[int]:
        """Run all steps that are not `done`, in ranges. Yields the number of steps of each.

        Args:
            keep_after: numbers of steps after which the latents are kept in `trajectory`.
            rest_after: those after which nothing is handed over until the caller asks for more.
            rest: whether to rest after what is handed over already.
            profiler: watches its steps, called one by one.
        """
        window = range(0) if profiler is None else profiler.steps
        if profiler is not None and window.start == 0:
            profiler.start()
        borders = {*keep_after, *rest_after, window.start, window.stop}
        for steps in self._run_steps("run", borders, rest, profiler, start=self.done):
            self.done = steps.stop
            if steps.stop in keep_after:
                self.trajectory.append(self.latents())
            if profiler is not None and steps.stop == window.start:
                profiler.start()
            if profiler is not None and steps.stop == window.stop:
                profiler.stop()
            yield len(steps)

    def repeat(self, times: int) -> None:
        """Measure all steps some times more; what the first run gave stays as it is."""
        result = self.state
        for _ in range(times):
            with self.report.part("repeats"):
                if self.tables is not None:
                    self.state = jax.block_until_ready(self._first_state())
                began = time.perf_counter()
                for _ in self._run_steps("repeats"):
                    pass
                self.report.repeats.append(time.perf_counter() - began)
        self.state = result

    def _ranges(self, start: int, borders: Collection[int], singly: range) -> list[range]:
        """The ranges of steps to call from `start` on; those in `singly` one by one."""
        step = self.steps_per_call or (self.evaluations if self.loops_on_device else 1)
        if self.tables is None:
            step = 1
        # Where guidance begins or ends, another program takes over.
        guided = (self.guided.start, self.guided.stop)
        every = {*range(0, self.evaluations, step), *guided, *borders, *singly, start}
        starts = sorted(i for i in every if start <= i < self.evaluations)
        stops = [*starts[1:], self.evaluations]
        return [range(*ends) for ends in zip(starts, stops, strict=True)] if starts else []

    def _run_steps(
        self,
        part: str,
        borders: Collection[int] = (),
        rest: Callable[[], bool] = bool,
        profiler: JaxProfiler | None = None,
        *,
        start: int = 0,
    ) -> Iterator[range]:
        """Run the steps from `start` on. Yields each range when it is done.

        A range is handed to the devices before the one before it is finished, so that they never
        wait for the host; but none beyond one of `borders`, or after `rest` said so, before all
        are done and the caller asks for more. Then `at_rest` is true.

        Args:
            part: of the report, to count the seconds as; those of profiled steps are `profile`.
        """
        window = range(0) if profiler is None else profiler.steps
        advance = self._ahead_on_host() if self.tables is None else self._ahead_on_devices(start)
        running: deque[tuple[range, Any, str]] = deque()  # what is there when the steps are done
        ended = time.perf_counter()
        for steps in self._ranges(start, borders, window):
            counted = "profile" if steps.start in window else part
            with self.report.part(counted):
                if profiler is not None and steps.start in window:
                    with profiler.step(steps.start):
                        done = advance(steps)
                else:
                    done = advance(steps)
            running.append((steps, done, counted))
            is_last = steps.stop == self.evaluations
            all_of_them = is_last or steps.stop in borders or rest()
            while running and (all_of_them or len(running) > RANGES_AHEAD):
                ended = self._wait(*running[0], since=ended)
                finished, *_ = running.popleft()
                self.at_rest = not running
                yield finished
                if self.at_rest:  # what the caller did meanwhile is not the next step's
                    ended = time.perf_counter()

    def _wait(self, steps: range, done: Any, part: str, *, since: float) -> float:
        """Wait for a range of steps, and report it. Returns when it ended."""
        with self.report.part(part):
            jax.block_until_ready(done)
        ended = time.perf_counter()
        program = self.compiled[self._program_key(steps.start in self.guided)]
        self.report.count_flops(part, (program.flops or 0.0) * self.mesh.size * len(steps))
        if part == "run" and len(steps) == 1:
            self.report.step_seconds.append(ended - since)
        return ended

    def _ahead_on_devices(self, start: int) -> Callable[[range], Array]:
        """A function that starts the next steps, and returns what is there when they are done."""
        done = self._step_number(start)

        def advance(steps: range) -> Array:
            nonlocal done
            guided = steps.start in self.guided
            self.state, done = self._run_range(self.state, done, steps, guided)
            return done

        return advance

    def _ahead_on_host(self) -> Callable[[range], None]:
        """A function that steps the scheduler itself after a compiled model evaluation."""
        generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        timesteps = self.sampler.restart(self.seeds)
        scale = self.sampler.initial_noise_scale
        drawn = [draw_initial_latents(g, self.latent_shape, scale) for g in generators]
        self.state = torch.cat(drawn)

        def advance(steps: range) -> None:
            (i,) = steps
            model_input = self.sampler.scale_model_input(self.state, timesteps[i])
            arguments = self._predict_arguments(
                i in self.guided, model_input.numpy(), float(timesteps[i])
            )
            output = self.compiled[self._program_key(i in self.guided)](*arguments)
            noise_pred = torch.from_numpy(fetch(output).copy())
            self.state = self.sampler.step(noise_pred, timesteps[i], self.state, generators)

        return advance

    def _run_range(
        self, state: tuple[Array, Array], first: Array, steps: range, guided: bool
    ) -> tuple[tuple[Array, Array], Array]:
        """Start some steps; `state` is given away.

        Returns the state after them and the next step, which is there when they are done.

        Args:
            first: the first of the steps, on the devices already.
        """
        program, arguments = self.compiled[self._program_key(guided)], self._arguments(guided)
        if self.loops_on_device:
            return program(self.parameters, state, arguments, first, np.int32(steps.stop))
        for _ in steps:
            state, first = program(self.parameters, state, arguments, first)
        return state, first

    def latents(self) -> np.ndarray:
        """The group's latents [B, C, h, w] float32."""
        if self.tables is None:
            return np.array(self.state.numpy())
        with self.report.part("device_to_host"):
            return fetch(self.state[0])


def _named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a program the name under which compile logs and traces show it."""

    def program(*arguments: Any) -> Any:
        return function(*arguments)

    program.__name__ = program.__qualname__ = name
    return program
