"""Pictures are encoded as by diffusers' VAE: whole, in tiles, on several devices."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from common.compute.clock import StageReport
from common.compute.kept import Kept
from common.compute.options import RunOptions
from common.errors import BadInputFileError
from common.models.checkpoint import Checkpoint
from common.vae.encoder import Encoder, Posterior
from common.vae.loading import open_decoder, open_encoder
from tests.refusals import refusal
from tests.vae.tiny_vae import (
    TILE,
    encode_by_diffusers,
    random_latents,
    save_tiny_autoencoder,
    save_vae,
    to_load,
)

PICTURES = random_latents(2, 3, 4 * TILE, 3 * TILE).clip(-1, 1)


def encoder_of(
    checkpoint: Checkpoint, backend: str, mesh: str = "auto", *, tile: bool = False
) -> Encoder:
    vae, options = to_load(checkpoint, tile=tile), RunOptions(mesh=mesh)
    return open_encoder(Kept(), backend, vae, PICTURES.shape, options, StageReport(0))


def check(found: Posterior, expected: tuple[np.ndarray, np.ndarray]) -> None:
    np.testing.assert_allclose(found.mean, expected[0], atol=1e-5)
    np.testing.assert_allclose(found.std, expected[1], atol=1e-5)
    assert found.mean.dtype == found.std.dtype == np.float32


@pytest.mark.parametrize("tile", [False, True])
@pytest.mark.parametrize(
    ("backend", "mesh"), [("torch", "auto"), ("jax", "single"), ("jax", "data=2,rows=2")]
)
def test_posteriors_are_those_of_diffusers(
    checkpoint: Checkpoint, backend: str, mesh: str, tile: bool
) -> None:
    encoder = encoder_of(checkpoint, backend, mesh, tile=tile)
    found = encoder.encode(PICTURES, warm_up=True)
    check(found, encode_by_diffusers(checkpoint, PICTURES, tile=tile))
    assert {"warm_up", "run"} <= encoder.runner.report.parts().keys()


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_a_tiny_autoencoder_gives_latents_alone(tmp_path: Path, backend: str) -> None:
    checkpoint = save_tiny_autoencoder(tmp_path)
    found = encoder_of(checkpoint, backend).encode(PICTURES)
    check(found, encode_by_diffusers(checkpoint, PICTURES))
    assert not found.std.any()


def test_both_halves_share_the_weights(checkpoint: Checkpoint) -> None:
    kept, vae, options = Kept(most_models=1), to_load(checkpoint), RunOptions(mesh="single")
    latents, report = random_latents(2, 4, 4, 4), StageReport(3)
    encoder = open_encoder(kept, "jax", vae, PICTURES.shape, options, StageReport(0))
    encoder.encode(PICTURES)
    decoder = open_decoder(kept, "jax", vae, [latents.shape], options, report)
    decoder.decode(latents)
    assert "weights_bytes" not in report.facts
    assert [each.name for each in report.programs.each] == ["decode_whole"]


def test_a_decoder_alone_encodes_nothing(tmp_path: Path) -> None:
    checkpoint = save_vae(tmp_path)
    path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    alone = {n: w for n, w in weights.items() if not n.startswith(("encoder.", "quant_conv."))}
    assert len(alone) < len(weights)
    save_file(alone, path)
    with refusal(BadInputFileError, str(path.parent), "a VAE's decoder alone", "encoded"):
        encoder_of(checkpoint, "torch")
