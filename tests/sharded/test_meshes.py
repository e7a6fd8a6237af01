"""Every mesh gives the single device's latents and pictures, on eight virtual CPU devices."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from common.compute import program_store
from common.compute.devices import Devices
from common.compute.platforms import usable_cores
from common.compute.sharding import ActivationLayout
from common.runs.generation import GenerationConfig
from tests.conftest import LONG
from tests.in_process import Ours, make_config, pixel_difference, relative_difference
from tests.tiny_checkpoints import save_sd, save_sdxl

FAMILIES: dict[str, Callable[[Path], Path]] = {"SDXL": save_sdxl, "SD 2": save_sd}
MESHES = [
    *("cfg=2,rows=4", "tensor=4", "data=2,cfg=2,rows=2"),
    *(pytest.param(mesh, marks=LONG) for mesh in ("data=8", "rows=8")),
]


class Single:
    """A checkpoint's pictures by one device."""

    def __init__(self, model: Path, **settings: Any) -> None:
        self.config = make_config(
            model,
            height=128,  # latents of 16 rows, 8 at the UNet's lowest level
            width=64,
            num_inference_steps=3,
            num_images_per_prompt=8,
            **settings,
        )
        ours = Ours(model, mesh="single")
        self.latents = ours.denoise(self.config)
        self.pictures = ours.decode(self.latents)


@pytest.fixture(scope="module", params=["SDXL", pytest.param("SD 2", marks=LONG)])
def single(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Single:
    return Single(FAMILIES[request.param](tmp_path_factory.mktemp("tiny") / "model"))


def check_equal(ours: Ours, config: GenerationConfig, single: Single) -> None:
    latents = ours.denoise(config)
    assert relative_difference(latents, single.latents) < 1e-4
    assert pixel_difference(ours.decode(latents), single.pictures) <= 1


def test_the_cores_of_a_cpu_take_images_then_halves(single: Single) -> None:
    """What `auto` is without an accelerator."""
    ours = Ours(single.config.model_id, mesh="auto")
    check_equal(ours, single.config, single)
    sizes = dict(ours.denoiser.mesh.shape)
    assert sizes["rows"] == sizes["tensor"] == 1
    assert sizes["data"] == max(d for d in (1, 2, 4, 8) if d <= usable_cores())


@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_equals_one_device(single: Single, mesh: str) -> None:
    check_equal(Ours(single.config.model_id, mesh=mesh), single.config, single)


@pytest.mark.parametrize("mesh", ["cfg=2,rows=4", pytest.param("data=2,cfg=2", marks=LONG)])
def test_guidance_in_a_part_of_the_steps(
    mesh: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without guidance the devices of the other half share the rows."""
    single = Single(save_sdxl(tmp_path / "model"), guidance_start=0.3, guidance_end=0.7)
    check_equal(Ours(single.config.model_id, mesh=mesh), single.config, single)
    said = "steps without guidance: the devices of the other half take their share of the rows"
    assert capsys.readouterr().out.count(said) == 1


def test_a_size_that_rows_do_not_divide_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_sdxl(tmp_path / "model")
    config = make_config(model, height=96, width=64, num_inference_steps=2)  # 12 rows, then 6
    expected = Ours(model, mesh="single").denoise(config)
    latents = Ours(model, mesh="rows=8").denoise(config)
    said = capsys.readouterr().err
    assert "rows=8 does not divide the rows of every level of the model (12, 6)" in said
    assert "the mesh is rows=2, and 6 device(s) stay idle" in said
    assert relative_difference(latents, expected) < 1e-4


@pytest.mark.parametrize(
    ("mesh", "parts"),
    [
        ("data=8", {"batch": 8, "rows": 1}),
        ("cfg=2,rows=4", {"batch": 2, "rows": 4}),
        ("rows=8", {"batch": 1, "rows": 8}),
        ("data=2,cfg=2,rows=2", {"batch": 4, "rows": 2}),
    ],
)
@pytest.mark.slow
def test_activations_are_really_split(
    mesh: str, parts: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What XLA settled on for every block's output, not what was asked of it."""
    model = save_sdxl(tmp_path / "model")
    found: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    own = ActivationLayout.constrain

    def watch(self: ActivationLayout, name: str, module: Any, x: jax.Array) -> jax.Array:
        x = own(self, name, module, x)
        if x.ndim == 4 or type(module).__name__ == "BasicTransformerBlock":
            shape = x.shape
            jax.debug.inspect_array_sharding(
                x, callback=lambda sharding: found.append((shape, sharding.shard_shape(shape)))
            )
        return x

    monkeypatch.setattr(ActivationLayout, "constrain", watch)
    monkeypatch.setattr(program_store, "store_folder", lambda: None)  # what is watched is a trace
    config = make_config(
        model, height=128, width=64, num_inference_steps=1, num_images_per_prompt=8
    )
    Ours(model, mesh=mesh).denoise(config)
    pictures = [(whole, part) for whole, part in found if len(whole) == 4]
    tokens = [(whole, part) for whole, part in found if len(whole) == 3]
    assert len(pictures) > 30 and len(tokens) > 3
    for whole, part in pictures:
        assert (whole[0] // part[0], whole[2] // part[2]) == (parts["batch"], parts["rows"])
        assert (whole[1], whole[3]) == (part[1], part[3])
    for whole, part in tokens:
        assert (whole[0] // part[0], whole[1] // part[1]) == (parts["batch"], parts["rows"])


@pytest.mark.parametrize(
    ("mesh", "axis", "share"),
    [
        ("cfg=2,rows=4", "rows", 4),
        pytest.param("tensor=2,data=2", "data", 2, marks=LONG),
    ],
)
def test_weights_that_do_not_fit_are_split(
    mesh: str,
    axis: str,
    share: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    single = Single(save_sdxl(tmp_path / "model"))
    small = Devices(jax.devices(), True, memory_bytes=100_000)
    monkeypatch.setattr(Devices, "present", lambda: small)
    ours = Ours(single.config.model_id, mesh=mesh)
    latents = ours.denoise(single.config)
    said = f"weights do not fit on every device: each step gathers them over {axis}"
    assert said in capsys.readouterr().out
    parameters = ours.denoiser.parameters
    whole = sum(array.nbytes for array in parameters.values())
    held = sum(array.addressable_shards[0].data.nbytes for array in parameters.values())
    assert held < 1.2 * whole / share + 50_000  # what divides by no axis stays whole
    assert relative_difference(latents, single.latents) < 1e-4


def test_weights_are_split_by_tensor_alone(tmp_path: Path) -> None:
    model = save_sdxl(tmp_path / "model")
    for mesh, split in (("tensor=4", True), ("cfg=2,rows=4", False)):
        ours = Ours(model, mesh=mesh)
        ours.denoise(make_config(model, height=64, width=64, num_inference_steps=1))
        parameters = ours.denoiser.parameters
        whole = {name for name, array in parameters.items() if array.is_fully_replicated}
        assert (len(whole) < len(parameters)) == split
        for name, array in parameters.items():
            if name.endswith("attn1.to_q.weight") and split:
                assert array.sharding.shard_shape(array.shape)[0] * 4 == array.shape[0]
            if "resnets" in name:
                assert name in whole
        assert all(np.isfinite(array).all() for array in parameters.values())
