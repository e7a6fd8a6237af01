"""PyTorch's denoising gives diffusers' latents, one step at a time."""

import numpy as np
import pytest
import torch

from common.compute.clock import StageReport
from common.compute.options import RunOptions
from common.models.checkpoint import Checkpoint
from common.sampling.loading import load_torch_unet
from common.sampling.torch_denoiser import AttentionIn16Bits, TorchDenoiser
from tests.sampling.tiny_unet import (
    ROUNDING,
    denoise_by_diffusers,
    make_job,
    open_one,
    relative_difference,
    run,
    to_load,
)


@pytest.mark.parametrize(
    "guidance", [{}, {"scale": 1.0}, {"start": 0.3, "end": 0.8}], ids=["all", "none", "in some"]
)
@pytest.mark.parametrize("scheduler", ["euler", "heun", "euler_a"])
def test_latents_are_those_of_diffusers(
    checkpoint: Checkpoint, scheduler: str, guidance: dict[str, float]
) -> None:
    job = make_job(prompts=2, images_per_prompt=1, scheduler=scheduler, **guidance)  # type: ignore[arg-type]
    found = run(open_one("torch", checkpoint, job), job)
    for index in range(2):
        expected = denoise_by_diffusers(checkpoint, job, index)
        assert relative_difference(found[index], expected) < ROUNDING


def test_a_group_has_the_projections_of_its_own_prompts(checkpoint: Checkpoint) -> None:
    """They are computed once for all steps of a group, and not taken for the next one's."""
    jobs = [make_job(seed=seed) for seed in (1, 2)]
    one = open_one("torch", checkpoint, jobs[0])
    for job in (*jobs, jobs[0]):
        alone = run(open_one("torch", checkpoint, job), job)
        np.testing.assert_array_equal(run(one, job), alone)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_16_bits_have_an_attention_of_their_own(checkpoint: Checkpoint, dtype: str) -> None:
    unet = load_torch_unet(to_load(checkpoint, dtype=dtype), StageReport(2), {}).unet
    denoiser, job = TorchDenoiser(unet, RunOptions(), StageReport(2)), make_job()
    own = {type(processor) for processor in unet.attn_processors.values()}
    assert (own == {AttentionIn16Bits}) == (dtype == "bfloat16")
    found = run(denoiser, job)
    assert found.dtype == np.float32 and unet.dtype == getattr(torch, dtype)
    distance = relative_difference(found[0], denoise_by_diffusers(checkpoint, job, 0))
    assert (distance < ROUNDING) == (dtype == "float32") and distance < 0.1


def test_it_says_where_it_computes(checkpoint: Checkpoint) -> None:
    denoiser = open_one("torch", checkpoint, make_job())
    assert denoiser.facts()["backend"] == "torch" and "mesh" not in denoiser.facts()
    assert not denoiser.loops_on_device and denoiser.devices_of_images == 1
