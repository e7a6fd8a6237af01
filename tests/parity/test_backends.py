"""`--backend torch` computes what the compiled program computes, and what diffusers computes."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from common.sampling.jax_denoiser import prepare_model
from common.sampling.torch_denoiser import AttentionIn16Bits
from tests.conftest import DEMO, LONG, Run
from tests.in_process import (
    Ours,
    load_pipeline,
    make_config,
    pixel_difference,
    relative_difference,
    run_pipeline,
)
from tests.tiny_checkpoints import save_sd, save_sdxl

ROUNDING = 1e-5


@pytest.fixture(scope="module")
def in_torch() -> Ours:
    return Ours(DEMO, backend="torch")


@pytest.fixture(scope="module")
def in_jax() -> Ours:
    return Ours(DEMO)


@pytest.mark.parametrize(
    "settings",
    [
        {"batch": 3, "num_inference_steps": 5},
        {"scheduler": "euler_a", "num_images_per_prompt": 2},
        {"scheduler": "dpmpp_2m", "guidance_scale": 1.0},
        {"guidance_rescale": 0.7, "width": 192},
        {"scheduler": "heun", "num_inference_steps": 4},
        {"scheduler": "dpmpp_sde", "num_inference_steps": 2},
    ],
    ids=str,
)
def test_torch_equals_diffusers(in_torch: Ours, settings: dict[str, Any]) -> None:
    config = make_config(DEMO, **settings)
    latents = in_torch.denoise(config)
    expected, pictures = run_pipeline(load_pipeline(DEMO), config)
    assert relative_difference(latents, expected) < ROUNDING
    assert pixel_difference(in_torch.decode(latents), pictures) <= 1


@pytest.mark.parametrize(
    "settings",
    [
        {"batch": 3},
        pytest.param({"guidance_start": 0.2, "guidance_end": 0.7}, marks=LONG),
        {"guidance_rescale": 0.5, "scheduler": "lcm"},
        {"scheduler": "ddim", "scheduler_options": {"clip_sample": True}, "guidance_scale": 2.0},
    ],
    ids=["batch", "guidance in some steps", "noise in every step", "scheduler on the host"],
)
def test_torch_equals_jax(in_torch: Ours, in_jax: Ours, settings: dict[str, Any]) -> None:
    config = make_config(DEMO, num_inference_steps=5, **settings)
    latents = in_jax.denoise(config)
    assert relative_difference(in_torch.denoise(config), latents) < ROUNDING
    assert pixel_difference(in_torch.decode(latents), in_jax.decode(latents)) <= 1


@pytest.mark.parametrize("save", [save_sdxl, save_sd])
def test_checkpoints_of_every_family(save: Any, tmp_path: Path) -> None:
    model = save(tmp_path / "model")
    config = make_config(model, height=64, width=64, num_inference_steps=4, guidance_scale=2.0)
    latents = Ours(model, backend="torch").denoise(config)
    expected, _ = run_pipeline(load_pipeline(model), config)
    assert relative_difference(latents, expected) < ROUNDING


def test_a_unet_that_is_told_the_guidance_scale(tmp_path: Path) -> None:
    model = save_sdxl(tmp_path / "model", time_cond_proj_dim=32)
    config = make_config(model, height=64, width=64, num_inference_steps=3)
    both = [Ours(model, backend=backend).denoise(config) for backend in ("torch", "jax")]
    assert relative_difference(*both) < ROUNDING


@pytest.mark.slow
@pytest.mark.parametrize("backend", [pytest.param("torch", marks=LONG), "jax"])
def test_bfloat16_is_as_near_to_float32_as_diffusers_own(backend: str, in_jax: Ours) -> None:
    """On CPUs jax computes 16-bit products in float32, PyTorch with attention of its own kind."""
    config = make_config(DEMO, batch=3, num_inference_steps=10)
    exact = in_jax.denoise(config)
    latents = Ours(DEMO, backend=backend, dtype="bfloat16").denoise(config)
    pipeline = load_pipeline(DEMO)
    pipeline.unet.to(torch.bfloat16)
    theirs, _ = run_bfloat16(pipeline, config)
    own = relative_difference(latents, exact)
    print("bfloat16 differs by", own, "diffusers' by", relative_difference(theirs, exact))
    assert 1e-4 < own < 1.5 * relative_difference(theirs, exact)


def run_bfloat16(pipeline: Any, config: Any) -> tuple[np.ndarray, np.ndarray]:
    """diffusers' UNet in bfloat16, everything around it in float32."""
    unet = pipeline.unet
    forward = unet.forward

    def in_bfloat16(sample: torch.Tensor, timestep: Any, **kwargs: Any) -> Any:
        added = kwargs.pop("added_cond_kwargs")
        kwargs["added_cond_kwargs"] = added | {"text_embeds": added["text_embeds"].bfloat16()}
        kwargs["encoder_hidden_states"] = kwargs["encoder_hidden_states"].bfloat16()
        return (forward(sample.bfloat16(), timestep, **kwargs)[0].float(),)

    unet.forward = in_bfloat16
    return run_pipeline(pipeline, config)


def test_projections_of_prompts_have_the_dtype_that_is_computed_in() -> None:
    """Beside weights that are kept in float32, as on CPUs."""
    unet = UNet2DConditionModel.from_pretrained(DEMO / "unet")
    weights = {name: jnp.asarray(weight.numpy()) for name, weight in unet.state_dict().items()}
    embeddings = jnp.ones((2, 77, unet.config.cross_attention_dim), jnp.bfloat16)
    _, given = prepare_model(unet, weights, embeddings, "fast")
    assert given and all(array.dtype == jnp.bfloat16 for array in given.values())


@pytest.mark.parametrize("tokens", [16, 1600, 3000])
def test_attention_in_16_bits_equals_float64(tokens: int) -> None:
    """All heads at once, one at a time, fused."""
    from diffusers.models.attention_processor import Attention

    torch.manual_seed(0)
    attention = Attention(query_dim=32, heads=4, dim_head=8).bfloat16()
    hidden = torch.randn(2, tokens, 32).bfloat16()
    with torch.no_grad():
        expected = attention.double()(hidden.double())
        attention.bfloat16().set_processor(AttentionIn16Bits())
        found = attention(hidden)
    assert relative_difference(found.float().numpy(), expected.numpy()) < 2e-2


def backend_of(run_dir: Path, stage: int) -> str:
    return str(json.loads((run_dir / f"stage{stage}_report.json").read_text())["backend"])


def test_the_stages_say_which_backend_they_used(run_copy: Path, quick_stage: Run) -> None:
    """float32 by jax; 16 bits and the VAE on a CPU by PyTorch, without jax."""
    assert [backend_of(run_copy, number) for number in (1, 2, 3)] == ["torch", "jax", "torch"]
    result = quick_stage(2, "--output_dir", run_copy, "--dtype", "bfloat16")
    assert result.returncode == 0 and "mesh" not in result.stdout, result.stderr
    assert backend_of(run_copy, 2) == "torch"
    result = quick_stage(2, "--output_dir", run_copy, "--backend", "torch", "--mesh", "single")
    assert result.returncode == 2 and "--backend torch" in result.stderr


def test_a_backend_is_no_setting(run_copy: Path, quick_stage: Run) -> None:
    """What was made by one is fresh for the other."""
    for number in (2, 3):
        for backend in ("torch", "jax"):
            result = quick_stage(
                number, "--output_dir", run_copy, "--skip_fresh", "--backend", backend
            )
            assert f"stage {number}: fresh" in result.stdout, result.stderr


def test_stage_2_by_torch_profiles_and_repeats(run_copy: Path, quick_stage: Run) -> None:
    flags = ("--backend", "torch", "--profile", "--repeat", 2, "--save_trajectory", 2)
    result = quick_stage(2, "--output_dir", run_copy, "--num_inference_steps", 6, *flags)
    assert result.returncode == 0, result.stderr
    report = json.loads((run_copy / "stage2_report.json").read_text())
    assert report["profile"]["steps"] == [2, 5] and len(report["repeat"]["seconds"]) == 2
    assert len(report["step_seconds"]) == 3  # the others were profiled
    assert set(report["profile"]["by_kind"]) >= {"resnet", "attention", "norm", "feed-forward"}
    assert (run_copy / "profile" / "stage2" / "denoise.pt.trace.json.gz").exists()
    assert report["programs"] is None and report["mesh"] is None
    result = quick_stage(3, "--output_dir", run_copy, "--backend", "torch", "--profile", "--warmup")
    assert result.returncode == 0, result.stderr
    report = json.loads((run_copy / "stage3_report.json").read_text())
    assert set(report["profile"]["by_kind"]) >= {"resnet", "attention", "norm"}
    assert report["seconds"]["warm_up"] > 0 and report["profile"]["steps"] is None
