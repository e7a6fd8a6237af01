"""A decoder of each run, around weights and programs that are kept from one run to the next."""

import gc
import weakref
from pathlib import Path

import jax
import numpy as np
import pytest

from common.compute.clock import StageReport
from common.compute.devices import Devices
from common.compute.kept import Kept
from common.compute.options import RunOptions
from common.errors import BadSettingError
from common.models.checkpoint import Checkpoint
from common.vae.jax_runner import JaxRunner
from common.vae.loading import (
    ImagesToSplit,
    VaeToLoad,
    images_to_decode,
    images_to_encode,
    load_jax_runner,
    make_tiles,
    open_decoder,
    settle_mesh,
)
from common.vae.torch_runner import TorchRunner
from common.vae.vae_settings import in_tiles
from tests.vae.tiny_vae import (
    TILE,
    decode_by_diffusers,
    largest_difference,
    random_latents,
    save_vae,
    to_load,
)

LATENTS = random_latents(1, 4, 4, 4)


def decode(
    kept: Kept, vae: VaeToLoad, backend: str = "jax", mesh: str = "single"
) -> tuple[np.ndarray, StageReport]:
    """One run's pictures and report."""
    report = StageReport(3)
    options = RunOptions(mesh=mesh)
    decoder = open_decoder(kept, backend, vae, [LATENTS.shape], options, report)
    return decoder.decode(LATENTS)[0], report


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_the_next_run_takes_what_is_kept(checkpoint: Checkpoint, backend: str) -> None:
    kept, vae = Kept(), to_load(checkpoint)
    first, report = decode(kept, vae, backend)
    assert report.facts["weights_bytes"] > 0 and "checkpoint_read" in report.parts()
    second, report = decode(kept, vae, backend)
    np.testing.assert_array_equal(first, second)
    assert "weights_bytes" not in report.facts
    assert not report.parts().keys() & {"checkpoint_read", "trace", "compile"}
    assert report.programs.each == []


def test_each_way_to_decode_is_loaded_for_itself(checkpoint: Checkpoint) -> None:
    kept = Kept(most_models=9)
    ways = [
        ("torch", "float32", "auto"),
        ("torch", "bfloat16", "auto"),
        ("jax", "float32", "single"),
        ("jax", "bfloat16", "single"),
        ("jax", "float32", "rows=2"),
    ]
    pictures = {}
    for loaded_now in (True, False):
        for backend, dtype, mesh in ways:
            found, report = decode(kept, to_load(checkpoint, dtype=dtype), backend, mesh)
            assert ("weights_bytes" in report.facts) == loaded_now
            before = pictures.setdefault((backend, dtype, mesh), found)
            np.testing.assert_array_equal(found, before)
    expected = decode_by_diffusers(checkpoint, LATENTS)
    for (_, dtype, _), found in pictures.items():
        assert largest_difference(found, expected) <= (1 if dtype == "float32" else 6)


def test_weights_that_were_replaced_are_read(tmp_path: Path) -> None:
    """The same folder holds another VAE: nothing of the first is taken for it."""
    kept = Kept()
    for seed in (0, 1):
        checkpoint = save_vae(tmp_path, seed=seed)
        found, _ = decode(kept, to_load(checkpoint))
        assert largest_difference(found, decode_by_diffusers(checkpoint, LATENTS)) <= 1


def test_programs_survive_the_weights_and_weights_do_not_survive_their_place(
    tmp_path: Path,
) -> None:
    kept, compiled = Kept(most_models=1), 0
    old: weakref.ref[jax.Array] | None = None
    for seed in (0, 1, 0):
        report = StageReport(3)
        vae = to_load(save_vae(tmp_path / str(seed), seed=seed))
        decoder = open_decoder(kept, "jax", vae, [LATENTS.shape], RunOptions(mesh="single"), report)
        assert isinstance(decoder.runner, JaxRunner)
        decoder.decode(LATENTS)
        compiled += len(report.programs.each)
        gc.collect()
        assert old is None or old() is None
        old = weakref.ref(decoder.runner.vae.parameters["post_quant_conv.weight"])
        del decoder
    assert compiled == 1


def test_devices_that_are_not_there_need_no_weights(tmp_path: Path) -> None:
    checkpoint = save_vae(tmp_path)
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    devices = Devices.described(jax.devices()[:1], 2**30)
    options = RunOptions(mesh="single")
    images, report = ImagesToSplit(1, [LATENTS.shape[2]]), StageReport(3)
    runner = load_jax_runner(to_load(checkpoint), images, options, report, devices, {})
    assert "convolution" in runner.lower("decode_whole", LATENTS.shape).as_text()


@pytest.mark.parametrize(
    ("size", "expected"), [((TILE, TILE), False), ((TILE + 1, 1), True), ((1, TILE + 1), True)]
)
def test_what_is_larger_than_a_tile_is_cut(
    checkpoint: Checkpoint, size: tuple[int, int], expected: bool
) -> None:
    shape = (1, 4, *size)
    assert in_tiles(True, checkpoint, shape) == expected
    assert not in_tiles(False, checkpoint, shape)
    assert (make_tiles(to_load(checkpoint, tile=True), shape) is not None) == expected
    assert make_tiles(to_load(checkpoint), shape) is None


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_tiles_and_whole_pictures_share_the_weights(checkpoint: Checkpoint, backend: str) -> None:
    kept, latents = Kept(), random_latents(1, 4, TILE + 4, 4)
    options = RunOptions(mesh="single")
    for tile in (False, True):
        vae = to_load(checkpoint, tile=tile)
        decoder = open_decoder(kept, backend, vae, [latents.shape], options, StageReport(3))
        found, _ = decoder.decode(latents)
        assert largest_difference(found, decode_by_diffusers(checkpoint, latents, tile=tile)) <= 1
        assert tile != ("weights_bytes" in decoder.runner.report.facts)
        assert isinstance(decoder.runner, TorchRunner if backend == "torch" else JaxRunner)


@pytest.mark.parametrize(
    ("asked", "rows", "expected"),
    [
        ("single", 8, "1 1"),
        ("data=2,cfg=2,rows=2", 8, "2 4"),  # one prediction of an image: cfg goes to the rows
        ("cfg=2,tensor=2", 8, "1 4"),
        ("rows=4", 6, "1 2"),  # 4 does not divide 6 rows
    ],
)
def test_the_mesh_of_a_vae(asked: str, rows: int, expected: str) -> None:
    mesh = settle_mesh(RunOptions(mesh=asked), ImagesToSplit(4, [rows]), Devices.present())
    assert f"{mesh.shape['data']} {mesh.shape['rows']}" == expected
    assert mesh.shape["cfg"] == mesh.shape["tensor"] == 1


def test_rows_divide_those_of_every_tile(
    checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = (1, 4, 20, 8)
    tiles = make_tiles(to_load(checkpoint, tile=True), shape)
    mesh = settle_mesh(
        RunOptions(mesh="rows=8"), images_to_decode([shape], tiles), Devices.present()
    )
    assert mesh.shape["rows"] == 2  # the last tile has two rows
    assert "warning: rows=8 does not divide the rows" in capsys.readouterr().err
    with pytest.raises(BadSettingError, match="--mesh needs 64 devices"):
        settle_mesh(RunOptions(mesh="data=64"), images_to_decode([shape], None), Devices.present())


def test_the_rows_of_an_encoding(checkpoint: Checkpoint) -> None:
    """Every level of every picture or tile: this VAE has two."""
    shape = (3, 3, 40, 16)
    assert images_to_encode(shape, None, checkpoint) == ImagesToSplit(3, [40, 20])
    tiles = make_tiles(to_load(checkpoint, tile=True), (3, 4, 20, 8))
    found = images_to_encode(shape, tiles, checkpoint)
    assert found.rows_of_levels == [16, 8, 16, 8, 16, 8, 4, 2]
