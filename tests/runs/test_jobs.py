"""What a run asks stage 2 to compute: its sampler, its images, what has no effect."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from common.declared import LATENTS
from common.errors import BadSettingError
from common.files.made_rows import MadeRows
from common.models.checkpoint import Checkpoint
from common.models.component_table import loaded_for
from common.models.find import open_checkpoint
from common.runs.jobs import (
    denoising_job,
    empty_beginning,
    latent_shape,
    make_sampler,
    packages_to_spare,
    refuse_unfit_inputs,
    warn_of_settings,
)
from common.sampling.denoising import denoise_images
from common.sampling.loading import UNetToLoad, open_denoiser
from tests.configs import make_config
from tests.conftest import DEMO
from tests.in_process import Ours
from tests.refusals import EMBEDDINGS, refusal, zeros
from tests.tiny_checkpoints import save_sd, save_sdxl


@pytest.fixture(scope="module")
def demo() -> Checkpoint:
    """The demo checkpoint: SDXL's architecture, Euler."""
    return open_checkpoint(make_config(DEMO), loaded_for(LATENTS))


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A checkpoint of SD's architecture, PNDM."""
    model = save_sd(tmp_path_factory.mktemp("models") / "sd")
    return open_checkpoint(make_config(model), loaded_for(LATENTS))


def test_the_sampler_is_the_checkpoints_own_unless_given(demo: Checkpoint, sd: Checkpoint) -> None:
    own = [type(make_sampler(make_config(DEMO), c).scheduler).__name__ for c in (demo, sd)]
    assert own == ["EulerDiscreteScheduler", "PNDMScheduler"]
    sampler = make_sampler(make_config(DEMO, scheduler="dpmpp_2m_karras"), demo)
    assert type(sampler.scheduler).__name__ == "DPMSolverMultistepScheduler"
    assert sampler.scheduler.config.use_karras_sigmas
    assert sampler.scheduler.config.prediction_type == "v_prediction"  # as the demo's own is


def test_an_eta_that_no_scheduler_takes_is_said(
    demo: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    make_sampler(make_config(DEMO, scheduler="ddim", eta=0.5), demo)
    assert capsys.readouterr().err == ""
    make_sampler(make_config(DEMO, eta=0.5), demo)
    assert "--eta 0.5 has no effect: EulerDiscreteScheduler takes none" in capsys.readouterr().err


def test_a_job_has_a_row_for_each_image(demo: Checkpoint) -> None:
    config = make_config(DEMO, batch=2, num_images_per_prompt=2, seed=7, width=192)
    rows = {name: torch.cat([tensor] * 2) for name, tensor in zeros(EMBEDDINGS).items()}
    job = denoising_job(config, demo, rows, make_sampler(config, demo))
    assert job.prompt_of.tolist() == [0, 0, 1, 1]
    assert job.seeds == [7, 8, 9, 10]
    assert tuple(job.latent_shape) == latent_shape(config, demo) == (4, 16, 24)
    assert job.embeddings.keys() == EMBEDDINGS.keys()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, ""),
        ({"negative_original_size": (64, 64), "negative_target_size": (64, 64)}, ""),
        ({"negative_original_size": (64, 64)}, "they need both --negative_original_size and"),
        ({"negative_crops_coords_top_left": (8, 0)}, "they need both --negative_original_size"),
    ],
)
def test_settings_without_effect_are_said(
    demo: Checkpoint, settings: dict, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    warn_of_settings([make_config(DEMO, **settings)], demo)
    heard = capsys.readouterr().err
    assert said in heard and bool(said) == bool(heard)


def test_nine_channels_are_for_masks_and_less_than_full_strength(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_sdxl(tmp_path / "nine", in_channels=9)
    checkpoint = open_checkpoint(make_config(model), loaded_for(LATENTS))
    with refusal(BadSettingError, "its UNet inpaints", "give --image and --mask_image"):
        refuse_unfit_inputs(make_config(model), checkpoint)
    begins = {"prompt": "x", "negative_prompt": "", "image": "a.png", "mask_image": "b.png"}
    capsys.readouterr()  # what saving it said
    for strength, said in ((None, False), (0.99, False), (1.0, True)):
        config = make_config(model, prompts=[begins], strength=strength)
        refuse_unfit_inputs(config, checkpoint)
        warn_of_settings([config], checkpoint)
        assert ("gives noise with public SDXL UNets" in capsys.readouterr().err) == said


def test_a_unet_that_is_told_the_scale_has_no_interval(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_sd(tmp_path / "lcm", time_cond_proj_dim=16)
    checkpoint = open_checkpoint(make_config(model), loaded_for(LATENTS))
    capsys.readouterr()  # what saving it said
    warn_of_settings([make_config(model)], checkpoint)
    assert capsys.readouterr().err == ""
    warn_of_settings([make_config(model, guidance_end=0.5)], checkpoint)
    assert "--guidance_end have no effect: this UNet is told" in capsys.readouterr().err


def test_only_what_nobody_needs_is_spared(demo: Checkpoint) -> None:
    assert packages_to_spare([make_config(DEMO)], demo) == ["peft", "transformers", "scipy"]
    assert "scipy" not in packages_to_spare([make_config(DEMO, scheduler="lms")], demo)
    beta = make_config(DEMO, scheduler_options={"use_beta_sigmas": True})
    assert "scipy" not in packages_to_spare([beta], demo)
    assert "scipy" not in packages_to_spare([make_config(DEMO), beta], demo)


@pytest.mark.parametrize("channels", [4, 8, 9])
def test_a_unet_that_sees_pictures_is_told_zeros_where_there_are_none(
    tmp_path: Path, channels: int
) -> None:
    """As --topology compiles it."""
    ours = Ours(save_sd(tmp_path / "model", in_channels=channels))
    config = make_config(
        tmp_path / "model", height=64, width=32, scheduler="ddim", num_inference_steps=2
    )
    job = replace(ours.job(config), begin=empty_beginning(ours.checkpoint, 1, (8, 4)))
    unet = UNetToLoad(checkpoint=ours.checkpoint, loras=(), dtype="float32")
    denoiser = open_denoiser(ours.kept, "jax", unet, [job], ours.options, ours.report)
    found = denoise_images(lambda _: denoiser, [job], ours.options, MadeRows.numbered(1)).latents
    assert found.shape == (1, 4, 8, 4) and np.isfinite(found.numpy()).all()
