"""The compiled decoding gives diffusers' pictures, on one device and on several."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.compute.clock import StageReport
from common.compute.devices import Devices
from common.compute.options import RunOptions
from common.models.checkpoint import Checkpoint
from common.vae import jax_runner, runner
from common.vae.decoder import Decoder
from common.vae.jax_runner import Programs
from common.vae.loading import ImagesToSplit, load_jax_runner
from tests.vae.tiny_vae import (
    decode_by_diffusers,
    largest_difference,
    random_latents,
    save_tiny_autoencoder,
    save_vae,
    to_load,
)

LATENTS = random_latents(2, 4, 6, 4)


def load(checkpoint: Checkpoint, mesh: str, programs: Programs, dtype: str = "float32") -> Decoder:
    vae, options = to_load(checkpoint, dtype=dtype), RunOptions(mesh=mesh)
    report, devices = StageReport(3), Devices.present()
    images = ImagesToSplit(len(LATENTS), [LATENTS.shape[2]])
    return Decoder(load_jax_runner(vae, images, options, report, devices, programs), None)


@pytest.mark.parametrize("mesh", ["single", "data=2,rows=2"])
def test_pictures_are_those_of_diffusers(checkpoint: Checkpoint, mesh: str) -> None:
    ours = load(checkpoint, mesh, {})
    pixels, finite = ours.decode(LATENTS)
    assert finite and pixels.dtype == np.uint8
    assert largest_difference(pixels, decode_by_diffusers(checkpoint, LATENTS)) <= 1
    facts = ours.runner.facts()
    assert (facts["mesh"], facts["devices"]) == (mesh, 1 if mesh == "single" else 4)


@pytest.mark.parametrize("mesh", ["single", "data=2,rows=2"])
def test_a_tiny_autoencoder_decodes_as_in_diffusers(tmp_path: Path, mesh: str) -> None:
    """TAESD, whose pictures people look at while they try prompts."""
    checkpoint = save_tiny_autoencoder(tmp_path)
    pixels, finite = load(checkpoint, mesh, {}).decode(LATENTS)
    assert finite
    assert largest_difference(pixels, decode_by_diffusers(checkpoint, LATENTS)) <= 1


def test_programs_serve_other_weights(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """What one run compiled the next one calls, with its own weights and report."""
    programs: Programs = {}
    first = load(checkpoint, "single", programs)
    first.decode(LATENTS, warm_up=True)
    assert [each.name for each in first.runner.report.programs.each] == ["decode_whole"]
    other = save_vae(tmp_path, seed=1)
    second = load(other, "single", programs)
    pixels, _ = second.decode(LATENTS, warm_up=True)
    assert second.runner.report.programs.each == []
    assert {"run", "warm_up"} <= second.runner.report.parts().keys()
    assert not second.runner.report.parts().keys() & {"trace", "compile"}
    assert largest_difference(pixels, decode_by_diffusers(other, LATENTS)) <= 1
    assert largest_difference(pixels, decode_by_diffusers(checkpoint, LATENTS)) > 10


def test_a_program_rounds_as_the_host_does() -> None:
    images = np.random.default_rng(2).normal(size=(2, 3, 16, 8)).astype(np.float32)
    expected, finite = runner.to_pixels(images)
    pixels, also = jax.jit(jax_runner.to_pixels)(images)
    np.testing.assert_array_equal(pixels, expected)
    assert bool(also) and finite
    images[0, 0, 0, 0] = np.nan
    assert not jax.jit(jax_runner.to_pixels)(jnp.asarray(images))[1]
