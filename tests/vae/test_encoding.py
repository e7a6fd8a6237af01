"""All pictures of a run, group by group; a run that is stopped goes on."""

import signal
from pathlib import Path

import numpy as np
import pytest

from common.compute.clock import StageReport
from common.compute.kept import Kept
from common.compute.options import RunOptions
from common.errors import NotFiniteError
from common.files.kept_progress import Progress
from common.models.checkpoint import Checkpoint
from common.stopping import StoppedError, StopRequest
from common.vae.encoder import Encoder
from common.vae.encoding import encode_groups, measure, split_by_parts
from common.vae.loading import open_encoder
from tests.refusals import refusal
from tests.vae.tiny_vae import encode_by_diffusers, random_latents, to_load

PICTURES = random_latents(5, 3, 8, 12).clip(-1, 1)


@pytest.fixture
def encoder(checkpoint: Checkpoint) -> Encoder:
    vae, report = to_load(checkpoint), StageReport(0)
    return open_encoder(Kept(), "torch", vae, PICTURES.shape, RunOptions(), report)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_a_picture_is_the_same_in_every_group(
    checkpoint: Checkpoint, encoder: Encoder, batch_size: int
) -> None:
    found = encode_groups(encoder, PICTURES, RunOptions(batch_size=batch_size))
    mean, std = encode_by_diffusers(checkpoint, PICTURES)
    np.testing.assert_allclose(found.mean, mean, atol=1e-5)
    np.testing.assert_allclose(found.std, std, atol=1e-5)


def test_parts_are_told_apart(encoder: Encoder) -> None:
    whole = encode_groups(encoder, PICTURES, RunOptions(batch_size=2))
    found = split_by_parts(whole, {"image_latents": 2, "masked_image_latents": 3})
    np.testing.assert_array_equal(found["image_latents"].mean, whole.mean[:2])
    np.testing.assert_array_equal(found["masked_image_latents"].std, whole.std[2:])


def test_a_stopped_encoding_goes_on(encoder: Encoder, tmp_path: Path) -> None:
    options, progress, stop = RunOptions(batch_size=2), Progress(tmp_path, 0, {}), StopRequest()
    expected = encode_groups(encoder, PICTURES, options)
    stop.number = signal.SIGTERM
    with refusal(StoppedError, "after 2 of 5 pictures, which are kept", "goes on from there"):
        encode_groups(encoder, PICTURES, options, progress=progress, stop=stop)
    # The first group is not encoded again: other pictures would give other latents.
    others = np.concatenate([PICTURES[:2] * 0, PICTURES[2:]])
    found = encode_groups(encoder, others, options, progress=progress)
    np.testing.assert_array_equal(found.mean, expected.mean)
    np.testing.assert_array_equal(found.std, expected.std)


def test_infinities_are_refused(encoder: Encoder) -> None:
    with refusal(NotFiniteError, "the VAE in float32", "--vae_dtype float32"):
        encode_groups(encoder, np.full_like(PICTURES, np.inf), RunOptions())


def test_it_measures_what_is_asked_for(encoder: Encoder, tmp_path: Path) -> None:
    assert measure(encoder, PICTURES, RunOptions(), tmp_path) is None
    profile = measure(encoder, PICTURES, RunOptions(repeat=2, profile=True), tmp_path / "profile")
    assert len(encoder.runner.report.repeats) == 2
    assert profile is not None
    assert any(o.module.startswith("vae.encoder") for o in profile.operations)
    assert (tmp_path / "profile" / "vae.pt.trace.json.gz").exists()
