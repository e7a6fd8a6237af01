"""Denoising by diffusers' UNet in PyTorch, on the CPU, by the same driver and tables.

Tells a defect of a model from one of a compiler, and is the faster one where XLA stays behind.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, SlicedAttnProcessor

from common.compute.allocator import LARGEST_IN_HEAP
from common.compute.backends import TORCH_FACTS
from common.compute.clock import StageReport
from common.compute.options import RunOptions
from common.compute.torch_profiler import TorchProfiler
from common.conditions.prepare import unet_call, unet_sample
from common.models.submodules import bypassed, prompt_projections
from common.sampling.denoiser import Conditions, Denoiser, State, prepare_schedule
from common.sampling.step_plan import StepProgram

MOST_SCORES = 2**21  # of several heads at once, 8 MB in float32


class AttentionIn16Bits:
    """diffusers' attention by plain products, some heads at a time, with a float32 softmax.

    PyTorch's fused attention on CPUs is no faster in 16 bits than in 32; its products are. Scores
    of a head that are too large to be kept from step to step lose to it: those are fused.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        attended = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        scores = hidden_states.shape[1] * attended.shape[1]  # of a head
        if 4 * scores > LARGEST_IN_HEAP:
            processor = AttnProcessor2_0()
        else:
            attn.upcast_softmax = True
            processor = SlicedAttnProcessor(max(1, MOST_SCORES // scores))
        return processor(attn, hidden_states, encoder_hidden_states, *args, **kwargs)


class TorchDenoiser(Denoiser):
    """One run's denoising by the UNet as PyTorch runs it, one step at a time."""

    loops_on_device = False
    ranges_ahead = 0  # a call returns when it is done
    devices_of_images = 1
    takes_several = False

    def __init__(self, unet: Any, options: RunOptions, report: StageReport) -> None:
        """`unet` holds its weights."""
        super().__init__(unet, options, report)
        if self.dtype != torch.float32:
            unet.set_attn_processor(AttentionIn16Bits())

    def _put(self, told: Conditions) -> None:
        self.told = told
        self.projected: dict[StepProgram, dict[str, torch.Tensor]] = {}
        self.weights = {n: torch.from_numpy(a) for n, a in self.guidance_weights.items()}
        if self.tables is None:
            return
        schedule = prepare_schedule(self.tables)
        self.schedule = {name: torch.from_numpy(array) for name, array in schedule.items()}
        self.own_noises = torch.from_numpy(self.noises)
        self.kept = {n: torch.from_numpy(a) for n, a in self.kept_area.arrays().items()}

    def compile(self) -> None:
        pass

    def _restore(self, latents: Any, history: Any, step: int) -> State:
        return torch.from_numpy(latents), torch.from_numpy(history)

    def _copied(self, latents: torch.Tensor) -> torch.Tensor:
        return latents  # each step makes new ones

    def _fetch(self, array: torch.Tensor) -> Any:
        return array.numpy()

    @torch.inference_mode()
    def _start_steps(self, state: State, steps: range, program: StepProgram) -> tuple[State, None]:
        latents, history = state
        schedule = self.schedule
        size = len(schedule["timesteps"])
        for i in steps:
            model_input = latents * schedule["input_scales"][i]
            history[i + 1] = self._evaluate(model_input, schedule["timesteps"][i], program)
            known = i + 2  # what later steps give has no weight yet
            latents = torch.tensordot(schedule["coefficients"][i, :known], history[:known], 1)
            differences = history[1 + size :][:i]  # of soft masks
            if len(differences):
                weights = schedule["coefficients"][i, 1 + size :][:i]
                latents += torch.tensordot(weights, differences, 1)
            if self.tables is not None and self.tables.noises:
                latents += torch.tensordot(schedule["noise_coefficients"][i], self.own_noises, 1)
            of_original, of_noise = schedule["kept_scales"][i]
            stays = of_original * self.kept["original"] + of_noise * self.kept["noise"]
            laid = torch.where(self.kept["masks"] >= schedule["free_from"][i], latents, stays)
            if len(history) > 1 + size:
                history[1 + size + i] = laid - latents
            latents = laid
        return (latents, history), None

    def _wait_for(self, done: Any) -> None:
        pass  # PyTorch is done when a call returns

    @torch.inference_mode()
    def _predict(
        self, model_input: torch.Tensor, timestep: float, program: StepProgram
    ) -> torch.Tensor:
        return self._evaluate(model_input, torch.tensor(timestep), program)

    def _evaluate(
        self, model_input: torch.Tensor, timestep: torch.Tensor, program: StepProgram
    ) -> torch.Tensor:
        """One model evaluation with guidance, as `jax_denoiser.predict`. [B, C, h, w] float32."""
        call, predictions = unet_call(self.conditions, self.told[program]), program.predictions
        if program not in self.projected:
            attended = call["encoder_hidden_states"]
            projections = prompt_projections(self.unet)
            self.projected[program] = {n: m(attended) for n, m in projections.items()}
        repeated = model_input.repeat_interleave(len(predictions), 0)  # [N, C, h, w]
        with bypassed(self.unet, self.projected[program]):
            sample = unet_sample(repeated.to(self.dtype), self.told[program], torch)
            output = self.unet(sample, timestep, **call)[0].float()
        by_prediction = output.unflatten(0, (-1, len(predictions))).unbind(1)
        predicted = dict(zip(predictions, by_prediction, strict=True))
        combined: torch.Tensor = self.guidance.combine(predicted, self.weights, torch)
        return combined

    def facts(self) -> dict[str, Any]:
        return TORCH_FACTS

    def profiler(self, folder: Path, steps: range) -> TorchProfiler:
        file = folder / "denoise.pt.trace.json.gz"
        return TorchProfiler(file, steps, self.report, {"unet": self.unet})
