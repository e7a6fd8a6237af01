"""Jobs for a VAE alone, as the process that holds the devices does them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from common.compute.kept import Kept
from common.errors import BadSettingError, NotFiniteError
from common.serving.jobs import Step
from common.serving.vae_jobs import (
    Answer,
    VaeRequest,
    is_vae_job,
    make_command,
    read_answer,
    write_request,
)
from tests.conftest import DEMO
from tests.refusals import refusal
from tests.vae.tiny_vae import random_latents

FLAGS = {"model_id": str(DEMO), "backend": "torch"}
LATENTS = random_latents(3, 4, 8, 16)
PIXELS = np.random.default_rng(1).integers(0, 256, (1, 3, 64, 32), np.uint8)


@pytest.fixture(scope="module")
def kept() -> Kept:
    return Kept()


@pytest.fixture(scope="module")
def vae() -> Any:
    return AutoencoderKL.from_pretrained(DEMO / "vae")


def compute(
    kept: Kept, run_dir: Path, array: np.ndarray, flags: dict[str, Any] | None = None, **asked: Any
) -> Answer:
    request = VaeRequest(**{"most_pixels": 2048**2, **asked})
    (step,) = write_request(request, array, run_dir, FLAGS | (flags or {}))
    assert is_vae_job(step) and step.stage == (0 if request.encodes else 3)
    make_command(kept).main(step.arguments[1:], standalone_mode=False)
    return read_answer(run_dir)


@pytest.mark.parametrize(
    "asked",
    [
        {"scaling_factor": 0.45513},
        {"do_scaling": True},
        {},
        {"scaling_factor": 2.0, "shift_factor": 0.25},
        {"shift_factor": 0.25},
    ],
    ids=str,
)
@torch.no_grad()
def test_pictures_are_those_of_diffusers(
    kept: Kept, vae: Any, tmp_path: Path, asked: dict[str, Any]
) -> None:
    factor = asked.get("scaling_factor", vae.config.scaling_factor if "do_scaling" in asked else 1)
    unscaled = torch.from_numpy(LATENTS) / factor + asked.get("shift_factor", 0)
    expected = vae.decode(unscaled).sample
    floats = compute(kept, tmp_path / "floats", LATENTS, output="floats", **asked)
    np.testing.assert_allclose(floats.array, expected.numpy(), atol=1e-5)
    pixels = compute(kept, tmp_path / "pixels", LATENTS, output="pixels", **asked)
    shown = VaeImageProcessor().postprocess(torch.from_numpy(floats.array), output_type="pil")
    np.testing.assert_array_equal(pixels.array, np.stack([np.asarray(each) for each in shown]))
    assert pixels.vae_dtype == "float32" and len(pixels.vae) == 64


@torch.no_grad()
def test_latents_are_those_of_diffusers(kept: Kept, vae: Any, tmp_path: Path) -> None:
    picture = Image.fromarray(PIXELS[0].transpose(1, 2, 0))
    expected = vae.encode(VaeImageProcessor().preprocess(picture)).latent_dist
    moments = compute(kept, tmp_path / "moments", PIXELS, output="moments")
    np.testing.assert_allclose(moments.array, expected.parameters.numpy(), atol=1e-4)
    asked = {"scaling_factor": 2.0, "shift_factor": 0.25}
    latents = compute(kept, tmp_path / "latents", PIXELS, output="latents", **asked)
    np.testing.assert_allclose(latents.array, (expected.mode().numpy() - 0.25) * 2, atol=1e-4)
    own = compute(kept, tmp_path / "own", PIXELS, output="latents", do_scaling=True)
    scaled = expected.mode().numpy() * vae.config.scaling_factor
    np.testing.assert_allclose(own.array, scaled, atol=1e-4)


def test_the_server_and_the_request_say_how(kept: Kept, tmp_path: Path) -> None:
    flags = {"dtype": "bfloat16", "batch_size": 2}
    found = compute(kept, tmp_path / "server", LATENTS, flags, output="pixels")
    assert found.vae_dtype == "bfloat16" and len(found.array) == 3
    asked = compute(kept, tmp_path / "asked", LATENTS, flags, output="pixels", vae_dtype="float32")
    assert asked.vae_dtype == "float32" and asked.vae == found.vae
    assert not np.array_equal(asked.array, found.array)
    large = random_latents(1, 4, 24, 16)  # than a tile of 16
    by_flag = compute(kept, tmp_path / "a", large, {"tile": True}, output="pixels").array
    whole = compute(kept, tmp_path / "b", large, {"tile": True}, output="pixels", tile=False).array
    np.testing.assert_array_equal(
        whole, compute(kept, tmp_path / "c", large, output="pixels").array
    )
    assert not np.array_equal(by_flag, whole)


@pytest.mark.parametrize(
    ("array", "asked", "said"),
    [
        (LATENTS[:, :3], {}, "has 3 channels: this VAE takes 4"),
        (LATENTS, {"most_pixels": 8191}, "8192 pixels are more than the 8191"),
        (LATENTS, {"vae": "of another"}, "vae: the server has another one"),
        (PIXELS[:, :1], {"output": "latents"}, "has 1 channels: this VAE takes 3"),
        (PIXELS[..., :31], {"output": "latents"}, "is 31×64: sides are to be multiples of 8"),
    ],
    ids=["channels", "pixels", "vae", "grey", "sides"],
)
def test_what_does_not_suit_the_vae(
    kept: Kept, tmp_path: Path, array: np.ndarray, asked: dict[str, Any], said: str
) -> None:
    with refusal(BadSettingError, said):
        compute(kept, tmp_path / "run", array, **{"output": "pixels", **asked})
    assert not (tmp_path / "run" / "vae_answer.safetensors").exists()


def test_what_is_not_finite_is_told(kept: Kept, tmp_path: Path) -> None:
    for output in ("pixels", "floats"):
        with np.errstate(all="ignore"), refusal(NotFiniteError, "values that are not finite"):
            compute(kept, tmp_path, np.full((1, 4, 8, 8), 3e38, np.float32), output=output)


def test_a_server_without_a_vae_of_its_own(kept: Kept, tmp_path: Path) -> None:
    flags = {"remote_vae": "http://127.0.0.1:9"}
    with refusal(BadSettingError, "this server's own VAE is another's (--remote_vae)"):
        compute(kept, tmp_path, LATENTS, flags, output="pixels")


def test_a_stages_command_is_none() -> None:
    assert not is_vae_job(Step(3, ["--output_dir=x"])) and not is_vae_job(Step(3, []))
