"""The VAE in PyTorch gives diffusers' pictures, and the report says how long it took."""

from pathlib import Path

import numpy as np
import pytest

from common.compute.clock import StageReport
from common.compute.options import RunOptions
from common.models.checkpoint import Checkpoint
from common.vae.decoder import Decoder
from common.vae.loading import load_torch_vae
from common.vae.torch_runner import TorchRunner
from tests.vae.tiny_vae import decode_by_diffusers, random_latents, to_load


def decoder_of(checkpoint: Checkpoint, dtype: str = "float32") -> Decoder:
    report = StageReport(3)
    vae = load_torch_vae(to_load(checkpoint, dtype=dtype), report)
    return Decoder(TorchRunner(vae, report), None)


def test_pictures_are_those_of_diffusers(checkpoint: Checkpoint) -> None:
    latents = random_latents(2, 4, 6, 4)
    pixels, finite = decoder_of(checkpoint).decode(latents)
    assert finite
    np.testing.assert_array_equal(pixels, decode_by_diffusers(checkpoint, latents))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_latents_beyond_the_dtype_are_told(checkpoint: Checkpoint, dtype: str) -> None:
    latents = np.full((1, 4, 4, 4), 3e38, np.float32)
    with np.errstate(over="ignore"):
        assert not decoder_of(checkpoint, dtype).decode(latents)[1]


def test_seconds_are_counted_as_what_they_are(checkpoint: Checkpoint) -> None:
    decoder = decoder_of(checkpoint)
    runner, latents = decoder.runner, random_latents(1, 4, 4, 4)
    decoder.decode(latents)
    assert {"checkpoint_read", "run"} <= runner.report.parts().keys()
    assert not runner.report.parts().keys() & {"warm_up", "repeats", "trajectory"}
    run = runner.report.parts()["run"]
    again = RunOptions(repeat=2)
    assert runner.measure(lambda: decoder.decode(latents), again, Path("nowhere")) is None
    with runner.counting_as("trajectory"):
        decoder.decode(latents)
    parts = runner.report.parts()
    assert parts["run"] == run
    assert parts["trajectory"] > 0
    assert len(runner.report.repeats) == 2 and sum(runner.report.repeats) <= parts["repeats"]
    assert runner.facts()["backend"] == "torch"


def test_it_warms_up_once(checkpoint: Checkpoint) -> None:
    decoder = decoder_of(checkpoint)
    calls: list[object] = []
    decoder.runner.module.decoder.register_forward_hook(lambda *_: calls.append(None))
    for _ in range(2):
        decoder.decode(random_latents(1, 4, 4, 4), warm_up=True)
    assert len(calls) == 3
    assert decoder.runner.report.parts()["warm_up"] > 0
