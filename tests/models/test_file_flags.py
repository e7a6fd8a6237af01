"""Flags inside single files stand for values of configs."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.models.file_flags import configs_in_file
from common.models.find import open_checkpoint
from common.runs.generation import RunSettings
from common.runs.jobs import make_sampler
from tests.configs import make_config
from tests.tiny_checkpoints import save_sd, save_sdxl

EMPTY = torch.zeros(0)
MEAN, STD = torch.tensor([-1.6, 1.1, -3.3, 0.9]), torch.tensor([8.4, 5.9, 5.9, 5.6])


@pytest.mark.parametrize(
    ("tensors", "scheduler", "vae"),
    [
        ({}, {}, {}),
        ({"v_pred": EMPTY}, {"prediction_type": "v_prediction"}, {}),
        (
            {"v_pred": EMPTY, "ztsnr": EMPTY},
            {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
            {},
        ),
        (
            {"edm_vpred.sigma_max": torch.tensor(100.0)},
            {
                "_class_name": "EDMEulerScheduler",
                "sigma_min": 0.002,
                "sigma_max": 100.0,
                "sigma_data": 1.0,
                "prediction_type": "v_prediction",
            },
            {},
        ),
        (
            {"edm_mean": MEAN.reshape(1, 4, 1, 1), "edm_std": STD.reshape(1, 4, 1, 1)},
            {
                "_class_name": "EDMEulerScheduler",
                "sigma_min": 0.002,
                "sigma_max": 80.0,
                "sigma_data": 0.5,
                "prediction_type": "epsilon",
            },
            {"latents_mean": MEAN.tolist(), "latents_std": STD.tolist()},
        ),
    ],
)
def test_flags_stand_for_values(
    tmp_path: Path,
    tensors: dict[str, torch.Tensor],
    scheduler: dict[str, object],
    vae: dict[str, object],
) -> None:
    file = tmp_path / "file.safetensors"
    save_file({"x": torch.zeros(1), **tensors}, file)
    flags, configs = configs_in_file(file, "--unet")
    assert flags == sorted(tensors, key=list(tensors).index)
    assert configs == {"scheduler": scheduler, "vae": vae}


def test_what_the_file_says_is_done_and_said(tmp_path: Path) -> None:
    model, file = save_sdxl(tmp_path / "model"), tmp_path / "noob.safetensors"
    weights = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    save_file(weights | {"v_pred": EMPTY, "ztsnr": EMPTY}, file)
    settings = RunSettings.model_validate({"model_id": str(model), "unet": str(file)})
    checkpoint = open_checkpoint(settings, ["unet"])
    scheduler = make_sampler(make_config(model), checkpoint).scheduler
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.config.rescale_betas_zero_snr is True
    assert checkpoint.said_by_file() == [
        "v_pred, ztsnr: scheduler's prediction_type is v_prediction",
        "v_pred, ztsnr: scheduler's rescale_betas_zero_snr is True",
    ]
    plain = open_checkpoint(RunSettings(model_id=str(model)), ["unet"])
    assert plain.said_by_file() == []
    assert "prediction_type" not in plain.config("scheduler")


@pytest.mark.parametrize(("says", "means"), [("v", "v_prediction"), ("epsilon", "epsilon")])
def test_metadata_tell_sd_2s_two_kinds_apart(tmp_path: Path, says: str, means: str) -> None:
    """Against configs that say the other; a tensor wins over metadata."""
    other = {"v_prediction": "epsilon", "epsilon": "v_prediction"}[means]
    model, file = save_sd(tmp_path / "model", prediction_type=other), tmp_path / "2.safetensors"
    weights = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    settings = RunSettings.model_validate({"model_id": str(model), "unet": str(file)})

    save_file(weights, file, {"modelspec.prediction_type": says})
    checkpoint = open_checkpoint(settings, ["unet"])
    assert make_sampler(make_config(model), checkpoint).scheduler.config.prediction_type == means
    assert checkpoint.said_by_file() == [
        f"modelspec.prediction_type: scheduler's prediction_type is {means}, not {other}"
    ]
    save_file(weights | {"v_pred": EMPTY}, file, {"modelspec.prediction_type": says})
    checkpoint = open_checkpoint(settings, ["unet"])
    assert checkpoint.config("scheduler")["prediction_type"] == "v_prediction"


def test_latents_are_unscaled_by_what_the_file_says(tmp_path: Path) -> None:
    model, file = save_sdxl(tmp_path / "model"), tmp_path / "playground.safetensors"
    weights = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    save_file(weights | {"edm_mean": MEAN.clone(), "edm_std": STD.clone()}, file)
    settings = RunSettings.model_validate({"model_id": str(model), "unet": str(file)})
    config = open_checkpoint(settings, ["vae"]).config("vae")
    assert config["latents_mean"] == MEAN.tolist() and config["latents_std"] == STD.tolist()
    sampler = make_sampler(make_config(model), open_checkpoint(settings, ["unet"]))
    assert type(sampler.scheduler).__name__ == "EDMEulerScheduler"
