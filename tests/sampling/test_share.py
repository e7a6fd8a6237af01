"""Groups with images of several runs: each as it is denoised alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.models.checkpoint import Checkpoint
from common.sampling.beginning import FromMaskedPictures
from common.sampling.job import DenoisingJob
from common.sampling.scheduler_tables import make_tables
from common.sampling.share import Share
from tests.sampling.tiny_unet import ROUNDING, SHAPE, make_job, open_one, run, save_unet

# Other schedulers, numbers of steps, guidance and seeds; one that draws noise, one of second order.
RUNS: dict[str, dict[str, Any]] = {
    "euler": {"steps": 5, "seed": 1, "scale": 4.0},
    "euler_a": {"steps": 3, "seed": 7, "scale": 2.0, "rescale": 0.5},
    "heun": {"steps": 3, "seed": 3, "scale": 7.0},
    "dpmpp_2m": {"steps": 7, "seed": 9, "scale": 5.0},
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> "tuple[Path, dict[str, np.ndarray]]":
    """A checkpoint, and the latents of each run by itself."""
    folder = tmp_path_factory.mktemp("unet")
    checkpoint = save_unet(folder)
    found = {name: run(open_one("jax", checkpoint, job), job) for name, job in jobs().items()}
    return folder, found


def jobs() -> dict[str, DenoisingJob]:
    return {
        name: make_job(scheduler=name, images_per_prompt=1 + (name == "heun"), **settings)
        for name, settings in RUNS.items()
    }


@pytest.mark.parametrize("mesh", ["single", "data=5", "cfg=2,rows=4"])
def test_runs_in_one_group_are_as_alone(
    alone: "tuple[Path, dict[str, np.ndarray]]", mesh: str
) -> None:
    folder, expected = alone
    runs = jobs()
    denoiser = open_one("jax", Checkpoint(str(folder), folder), runs["euler"], mesh=mesh)
    shares = [
        Share(job, np.arange(len(job.seeds)), make_tables(job.sampler)) for job in runs.values()
    ]
    denoiser.start(*shares)
    denoiser.compile()
    assert sum(denoiser.run()) == denoiser.evaluations == 7
    ends = np.cumsum([len(share.chosen) for share in shares])
    found = dict(zip(runs, np.split(denoiser.latents(), ends[:-1]), strict=True))
    for name in runs:
        np.testing.assert_allclose(found[name], expected[name], ROUNDING, ROUNDING, err_msg=name)
    assert len(denoiser.programs) == 1  # whatever schedulers, steps and guidance are


def test_a_picture_of_which_a_part_stays_beside_noise(tmp_path: Path) -> None:
    checkpoint, noise = save_unet(tmp_path), make_job(images_per_prompt=1, seed=1)
    generator = torch.Generator().manual_seed(2)
    names = [f"{part}image_latents_{kind}" for part in ("", "masked_") for kind in ("mean", "std")]
    tensors = {name: torch.rand((1, *SHAPE), generator=generator) for name in names}
    tensors["latent_masks"] = (torch.rand((1, 1, *SHAPE[1:]), generator=generator) > 0.5).float()
    begin = FromMaskedPictures(tensors, [0], {"scaling_factor": 0.5}, by_channels=False)
    masked = replace(make_job(images_per_prompt=1, seed=3, steps=6, scheduler="ddim"), begin=begin)
    shares = [
        Share(job, np.arange(1), make_tables(job.sampler, keeps_area=job.keeps_area))
        for job in (noise, masked)
    ]
    found = []
    for group in ([shares[0]], [shares[1]], shares):
        denoiser = open_one("jax", checkpoint, noise)
        denoiser.start(*group)
        denoiser.compile()
        assert sum(denoiser.run()) == denoiser.evaluations
        found.append(denoiser.latents())
    stays = tensors["latent_masks"].numpy() == 0
    assert stays.any() and (abs(found[1] - found[0]) > 0.1).any()
    np.testing.assert_allclose(found[2], np.concatenate(found[:2]), ROUNDING, ROUNDING)
