"""Guidance over an interval of the steps equals diffusers' own guider; distilled UNets embed it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ClassifierFreeGuidance

from common.sampling.scheduler_tables import NotLinearError
from tests.conftest import LONG
from tests.in_process import Ours, load_pipeline, make_config, relative_difference, run_pipeline
from tests.tiny_checkpoints import save_sd, save_sdxl


@pytest.fixture(scope="module")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sdxl(tmp_path_factory.mktemp("tiny") / "sdxl")


@torch.no_grad()
def run_with_guider(model: Path, guider: ClassifierFreeGuidance, steps: int) -> np.ndarray:
    """diffusers' components and guider in a plain loop, for one picture. Returns latents."""
    pipeline = load_pipeline(model)
    config = make_config(model)
    prompt = config.prompts[0]
    context, negative_context, pooled, negative_pooled = pipeline.encode_prompt(
        prompt=prompt.prompt, negative_prompt=prompt.negative_prompt, device="cpu"
    )
    time_ids = torch.tensor([[64.0, 64, 0, 0, 64, 64]])

    def predict(x: torch.Tensor, t: torch.Tensor, *text: torch.Tensor) -> torch.Tensor:
        added = {"text_embeds": text[1], "time_ids": time_ids}
        return pipeline.unet(x, t, encoder_hidden_states=text[0], added_cond_kwargs=added)[0]

    scheduler = pipeline.scheduler
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(config.seed)
    latents = torch.randn(1, 4, 8, 8, generator=generator) * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.scale_model_input(latents, t)
        guider.set_state(step=i, num_inference_steps=steps, timestep=t)
        conditional = predict(x, t, context, pooled)
        unconditional = None
        if guider.num_conditions == 2:
            unconditional = predict(x, t, negative_context, negative_pooled)
        output = guider.forward(conditional, unconditional).pred
        latents = scheduler.step(output, t, latents, return_dict=False)[0]
    return latents.numpy()


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (0.25, 0.65),
        (0.5, 0.5),
        *(pytest.param(*ends, marks=LONG) for ends in ((0.0, 0.5), (0.3, 1.0), (0.0, 1.0))),
    ],
)
@pytest.mark.parametrize("steps_per_call", [pytest.param(None, marks=LONG), 4])
@pytest.mark.slow
@pytest.mark.long
def test_an_interval_equals_diffusers_guider(
    tiny_sdxl: Path, start: float, end: float, steps_per_call: int | None
) -> None:
    guider = ClassifierFreeGuidance(guidance_scale=6.0, start=start, stop=end)
    expected = run_with_guider(tiny_sdxl, guider, steps=11)
    ours = Ours(tiny_sdxl, steps_per_call=steps_per_call)
    settings = dict(guidance_scale=6.0, guidance_start=start, guidance_end=end)
    config = make_config(tiny_sdxl, height=64, width=64, num_inference_steps=11, **settings)
    assert relative_difference(ours.denoise(config), expected) < 1e-4


@pytest.mark.parametrize(
    "scheduler", ["heun", *(pytest.param(s, marks=LONG) for s in ("ddim", "euler_a", "dpmpp_sde"))]
)
def test_stepping_on_the_host_equals_tables(
    tiny_sdxl: Path, scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = Ours(tiny_sdxl)
    settings = dict(scheduler=scheduler, guidance_start=0.2, guidance_end=0.7)
    config = make_config(tiny_sdxl, height=64, width=64, batch=2, num_inference_steps=6, **settings)
    by_tables = ours.denoise(config)

    def refuse(_: object, **__: object) -> None:
        raise NotLinearError("as if it clipped")

    monkeypatch.setattr("common.sampling.denoising.make_tables", refuse)
    assert relative_difference(ours.denoise(config), by_tables) < 1e-5
    assert ours.denoiser.tables is None


@pytest.mark.parametrize("family", ["SDXL", pytest.param("SD", marks=LONG)])
def test_a_distilled_unet_is_told_the_guidance_scale(tmp_path: Path, family: str) -> None:
    save = save_sdxl if family == "SDXL" else save_sd
    model = save(tmp_path / "model", time_cond_proj_dim=16)
    pipeline, ours = load_pipeline(model), Ours(model)
    latents = []
    for guidance_scale in (1.0, 4.0, 8.5):
        config = make_config(
            model,
            height=64,
            width=64,
            scheduler="lcm",
            num_inference_steps=4,
            guidance_scale=guidance_scale,
        )
        latents.append(ours.denoise(config))
        assert relative_difference(latents[-1], run_pipeline(pipeline, config)[0]) < 1e-4
    assert relative_difference(latents[1], latents[2]) > 1e-3
    assert ours.programs.compiled == 1
