"""All images of a run, group by group, and what a trajectory becomes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from common.compute.clock import StageReport
from common.compute.kept import Kept
from common.compute.options import RunOptions
from common.errors import NotFiniteError
from common.models.checkpoint import Checkpoint
from common.models.find import open_checkpoint
from common.vae.decoder import Decoder
from common.vae.decoding import (
    Latents,
    decode_all,
    decode_groups,
    decode_trajectory,
    grouped,
    measure,
)
from common.vae.grids import make_grid
from common.vae.loading import VaeToLoad, open_decoder
from tests.configs import make_config
from tests.conftest import DEMO
from tests.refusals import refusal
from tests.vae.tiny_vae import decode_by_diffusers, random_latents, to_load

LATENTS = random_latents(5, 4, 4, 6)


@pytest.fixture
def decoder(checkpoint: Checkpoint) -> Decoder:
    return open_decoder(
        Kept(), "torch", to_load(checkpoint), [LATENTS.shape], RunOptions(), StageReport(3)
    )


@pytest.fixture(scope="module")
def expected(checkpoint: Checkpoint) -> np.ndarray:
    return np.concatenate([decode_by_diffusers(checkpoint, each[None]) for each in LATENTS])


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_an_image_is_the_same_in_every_group(
    decoder: Decoder, expected: np.ndarray, batch_size: int
) -> None:
    found = decode_all(decoder, LATENTS, RunOptions(batch_size=batch_size))
    # Sums of a batch may be taken in another order.
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_some_images_are_decoded_as_all_are(decoder: Decoder) -> None:
    """In groups of the same size, whose rows have other neighbours."""
    latents, options = Latents.in_memory(LATENTS), RunOptions(batch_size=2)

    def decode(*todo: int) -> list[tuple[list[int], np.ndarray]]:
        groups = grouped(decoder, latents, todo, options)
        decoded = decode_groups(decoder, latents, groups, options)
        return [(group.own, pixels) for group, pixels in decoded]

    every = np.concatenate([pixels for _, pixels in decode(*range(5))])
    found = decode(4, 0, 3)
    assert [images for images, _ in found] == [[0, 3], [4]]
    for images, pixels in found:
        np.testing.assert_array_equal(pixels, every[images])
    assert decode() == []


def test_images_of_several_sizes_are_decoded_by_size(decoder: Decoder) -> None:
    """As many at once as all images of that size are, at most the batch."""
    of_sizes = [random_latents(3, 4, 6, 4), random_latents(1, 4, 4, 6)]
    sizes = [[0, 2, 3], [1]]

    def read(images: Sequence[int]) -> np.ndarray:
        number = int(images[0] == 1)
        return of_sizes[number][[sizes[number].index(image) for image in images]]

    latents, options = Latents(read, sizes), RunOptions(batch_size=2)
    groups = grouped(decoder, latents, [1, 2, 3], options)
    assert [(group.own, group.computed) for group in groups] == [([2, 3], [2, 3]), ([1], [1])]
    for group, pixels in decode_groups(decoder, latents, groups, options):
        expected = decode_all(decoder, read(group.own), options)
        np.testing.assert_array_equal(pixels, expected)


def test_it_measures_what_is_asked_for(decoder: Decoder, tmp_path: Path) -> None:
    latents = Latents.in_memory(LATENTS)
    assert measure(decoder, latents, RunOptions(), tmp_path / "profile") is None
    assert decoder.runner.report.repeats == [] and not (tmp_path / "profile").exists()
    options = RunOptions(repeat=3, profile=True, batch_size=2)
    profile = measure(decoder, latents, options, tmp_path / "profile")
    assert len(decoder.runner.report.repeats) == 3
    assert profile is not None and profile.steps is None
    assert any(o.module.startswith("vae.decoder") for o in profile.operations)
    assert (tmp_path / "profile" / "vae.pt.trace.json.gz").exists()


def test_a_trajectory_is_a_strip_and_frames(decoder: Decoder) -> None:
    trajectory = random_latents(3, 2, 4, 4, 6)  # three steps of two images
    strip, frames = decode_trajectory(decoder, trajectory, RunOptions())
    pictures = [decode_all(decoder, latents, RunOptions()) for latents in trajectory]
    rows = [np.concatenate([step[image] for step in pictures], axis=1) for image in (0, 1)]
    np.testing.assert_array_equal(strip, np.concatenate(rows))
    assert len(frames) == 3
    for frame, step in zip(frames, pictures, strict=True):
        np.testing.assert_array_equal(frame, make_grid(step))
    assert decoder.runner.report.parts()["trajectory"] > 0


@pytest.fixture(scope="module")
def demo_decoder() -> Decoder:
    """The demo checkpoint's VAE on one device."""
    checkpoint = open_checkpoint(make_config(DEMO, height=64, width=64), ["vae"])
    vae = VaeToLoad(checkpoint=checkpoint, dtype="float32", tile=False)
    options = RunOptions(mesh="single")
    return open_decoder(Kept(), "jax", vae, [(1, 4, 8, 8)], options, StageReport(3))


def test_a_vae_that_gives_infinities(demo_decoder: Decoder) -> None:
    """Latents that are finite, and so large that the VAE's arithmetic is not."""
    latents = np.full((1, 4, 8, 8), 1e38, np.float32)
    with refusal(
        NotFiniteError, "the VAE in float32", "no picture was written", "--vae_dtype float32"
    ):
        decode_all(demo_decoder, latents, RunOptions(batch_size=1))
