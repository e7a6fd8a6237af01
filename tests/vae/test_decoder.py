"""The same pictures on either backend, whole and in tiles."""

import numpy as np
import pytest

from common.compute.clock import StageReport
from common.compute.kept import Kept
from common.compute.options import RunOptions
from common.models.checkpoint import Checkpoint
from common.vae.loading import open_decoder
from tests.vae.tiny_vae import (
    TILE,
    decode_by_diffusers,
    largest_difference,
    random_latents,
    to_load,
)


@pytest.mark.parametrize("backend", ["jax", "torch"])
@pytest.mark.parametrize("tile", [False, True])
def test_pictures_are_those_of_diffusers(checkpoint: Checkpoint, backend: str, tile: bool) -> None:
    latents = random_latents(2, 4, TILE + 4, 6)
    vae, report = to_load(checkpoint, tile=tile), StageReport(3)
    options = RunOptions(mesh="single") if backend == "jax" else RunOptions()
    decoder = open_decoder(Kept(), backend, vae, [latents.shape], options, report)
    pixels, finite = decoder.decode(latents, warm_up=True)
    assert finite and pixels.dtype == np.uint8
    assert largest_difference(pixels, decode_by_diffusers(checkpoint, latents, tile=tile)) <= 1
    assert {"warm_up", "run"} <= report.parts().keys()
    assert tile == ("blending" in report.parts())
