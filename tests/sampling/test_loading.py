"""A denoiser of each run, around weights and programs that are kept from one run to the next."""

import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from common.compute.clock import StageReport
from common.compute.devices import Devices
from common.compute.kept import Kept
from common.compute.options import RunOptions
from common.errors import BadSettingError
from common.models.checkpoint import Checkpoint
from common.sampling.jax_denoiser import JaxDenoiser
from common.sampling.job import DenoisingJob
from common.sampling.loading import (
    UNetToLoad,
    load_jax_denoiser,
    open_denoiser,
    settle_mesh,
)
from common.sampling.share import Share
from tests.conftest import PROJECT_DIR
from tests.sampling.tiny_unet import (
    ROUNDING,
    denoise_by_diffusers,
    load_by_diffusers,
    make_job,
    relative_difference,
    run,
    save_lora,
    save_unet,
    start,
    to_load,
)

JOB = make_job(images_per_prompt=1, steps=3)
# A process in which nothing was computed before.
FRESH_PROCESS = """
import sys
from pathlib import Path
import numpy as np
from common.compute.kept import Kept
from common.models.checkpoint import Checkpoint
from common.models.model_settings import LoraFile
from tests.sampling.test_loading import denoise
from tests.sampling.tiny_unet import to_load

folder, lora, file = sys.argv[1:]
unet = to_load(Checkpoint(folder, Path(folder)), LoraFile(file=lora))
np.save(file, denoise(Kept(), unet)[0])
"""


def denoise(
    kept: Kept, unet: UNetToLoad, backend: str = "jax", **options: Any
) -> tuple[np.ndarray, StageReport]:
    """One run's latents and report."""
    report, given = StageReport(2), options if backend == "torch" else {"mesh": "single"} | options
    denoiser = open_denoiser(kept, backend, unet, [JOB], RunOptions(**given), report)
    return run(denoiser, JOB), report


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_the_next_run_takes_what_is_kept(checkpoint: Checkpoint, backend: str) -> None:
    kept, unet = Kept(), to_load(checkpoint)
    first, report = denoise(kept, unet, backend)
    assert report.facts["weights_bytes"] > 0 and "checkpoint_read" in report.parts()
    second, report = denoise(kept, unet, backend)
    np.testing.assert_array_equal(first, second)
    assert "weights_bytes" not in report.facts
    assert not report.parts().keys() & {"checkpoint_read", "trace", "compile"}
    assert report.programs.each == []
    assert relative_difference(second[0], denoise_by_diffusers(checkpoint, JOB, 0)) < ROUNDING


def test_another_lora_compiles_nothing_and_gives_the_bits_of_a_fresh_process(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    kept = Kept()
    plain, report = denoise(kept, to_load(checkpoint))
    assert len(report.programs.each) == 1
    lora = save_lora(checkpoint, tmp_path / "lora.safetensors", seed=3)
    found, report = denoise(kept, to_load(checkpoint, lora))
    assert report.programs.each == [] and "checkpoint_read" in report.parts()
    assert relative_difference(found, plain) > 1e-3
    arguments = [checkpoint.folder, lora.file, tmp_path / "fresh.npy"]
    result = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, *map(str, arguments)],
        cwd=PROJECT_DIR,
        env=os.environ,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    np.testing.assert_array_equal(found, np.load(tmp_path / "fresh.npy"))
    # The UNet without it is still there, and unchanged.
    again, report = denoise(kept, to_load(checkpoint))
    np.testing.assert_array_equal(again, plain)
    assert "checkpoint_read" not in report.parts()


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_a_lora_is_applied_and_taken_off_by_reading_what_it_changes(
    checkpoint: Checkpoint, tmp_path: Path, backend: str
) -> None:
    kept = Kept(most_models=1)
    first = save_lora(checkpoint, tmp_path / "a.safetensors", seed=1)
    other = save_lora(checkpoint, tmp_path / "b.safetensors", seed=2, targets=["to_k"])
    weights = {
        name: tensor.nbytes for name, tensor in load_by_diffusers(checkpoint).state_dict().items()
    }

    def bytes_of(*kinds: str) -> int:
        return sum(size for name, size in weights.items() if name.split(".")[-2] in kinds)

    read = []
    for loras in ((), (first,), (first, other), (other,), ()):
        unet = to_load(checkpoint, *loras)
        found, report = denoise(kept, unet, backend)
        np.testing.assert_array_equal(found, denoise(Kept(), unet, backend)[0])
        read.append(report.facts["weights_bytes"])
    of_both = bytes_of("to_q", "to_v", "to_k")
    whole, of_first, of_other = sum(weights.values()), bytes_of("to_q", "to_v"), bytes_of("to_k")
    assert read == [whole, of_first, of_both, of_both, of_other]


def test_all_that_is_kept_of_a_checkpoint_is_shared(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Where the plain one is there too, another LoRA reads what itself changes alone."""
    kept = Kept(most_models=3)
    first = save_lora(checkpoint, tmp_path / "a.safetensors", seed=1)
    other = save_lora(checkpoint, tmp_path / "b.safetensors", seed=2, targets=["to_k"])
    found = [
        denoise(kept, to_load(checkpoint, *loras))[1].facts["weights_bytes"]
        for loras in ((), (first,), (other,))
    ]
    state = load_by_diffusers(checkpoint).state_dict()
    assert found[2] == sum(t.nbytes for name, t in state.items() if ".to_k." in name)


def test_a_unet_is_kept_by_its_content(checkpoint: Checkpoint, tmp_path: Path) -> None:
    kept, unet = Kept(), to_load(checkpoint)
    first = save_lora(checkpoint, tmp_path / "a.safetensors", seed=1)
    moved = first.model_copy(update={"file": str(tmp_path / "moved.safetensors")})
    Path(moved.file).write_bytes(Path(first.file).read_bytes())

    def key(unet: UNetToLoad, *backend: str) -> tuple[Any, ...]:
        return unet.base(*(backend or ("jax",))), unet.added()

    assert key(to_load(checkpoint, moved)) == key(to_load(checkpoint, first))
    other = save_lora(checkpoint, tmp_path / "b.safetensors", seed=2)
    others = [
        key(unet),
        key(to_load(checkpoint, first)),
        key(to_load(checkpoint, other)),
        key(to_load(checkpoint, first.model_copy(update={"scale": 0.5}))),
        key(to_load(checkpoint, first, dtype="bfloat16")),
        key(to_load(checkpoint, first), "torch"),
        key(to_load(checkpoint, first), "jax", "another mesh"),
    ]
    assert len(set(others)) == len(others)
    # The same folder holds other weights: nothing of the first is taken for them.
    for seed in (1, 2):
        found, report = denoise(kept, to_load(save_unet(tmp_path / "same", seed=seed)))
        expected = denoise_by_diffusers(Checkpoint("", tmp_path / "same"), JOB, 0)
        assert relative_difference(found[0], expected) < ROUNDING
        assert "checkpoint_read" in report.parts()


@pytest.mark.slow
@pytest.mark.long
def test_each_way_to_denoise_is_loaded_for_itself(checkpoint: Checkpoint) -> None:
    kept, latents = Kept(most_models=9), dict[int, np.ndarray]()
    ways: list[tuple[str, str, dict[str, Any]]] = [
        ("torch", "float32", {}),
        ("torch", "bfloat16", {}),
        ("jax", "float32", {}),
        ("jax", "bfloat16", {}),
        ("jax", "float32", {"mesh": "cfg=2,rows=2"}),
        ("jax", "float32", {"operations": "torchax"}),
    ]
    for loaded_now in (True, False):
        for way, (backend, dtype, options) in enumerate(ways):
            found, report = denoise(kept, to_load(checkpoint, dtype=dtype), backend, **options)
            assert ("weights_bytes" in report.facts) == loaded_now
            before = latents.setdefault(way, found)
            np.testing.assert_array_equal(found, before)
    expected = denoise_by_diffusers(checkpoint, JOB, 0)
    for way, (_, dtype, _) in enumerate(ways):
        difference = relative_difference(latents[way][0], expected)
        assert difference < (ROUNDING if dtype == "float32" else 0.1)


def test_programs_survive_the_weights_and_weights_do_not_survive_their_place(
    tmp_path: Path,
) -> None:
    kept, compiled = Kept(most_models=1), 0
    old: weakref.ref[jax.Array] | None = None
    for seed in (0, 1, 0):
        report, unet = StageReport(2), to_load(save_unet(tmp_path / str(seed), seed=seed))
        denoiser = open_denoiser(kept, "jax", unet, [JOB], RunOptions(mesh="single"), report)
        assert isinstance(denoiser, JaxDenoiser)
        run(denoiser, JOB)
        compiled += len(report.programs.each)
        gc.collect()
        assert old is None or old() is None
        old = weakref.ref(denoiser.parameters["conv_in.weight"])
        del denoiser
    assert compiled == 1


def test_devices_that_are_not_there_need_no_weights(tmp_path: Path) -> None:
    checkpoint = save_unet(tmp_path)
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    devices, options = Devices.described(jax.devices()[:1], 2**30), RunOptions(mesh="single")
    denoiser = load_jax_denoiser(to_load(checkpoint), [JOB], options, StageReport(2), devices, {})
    denoiser.start(Share(JOB, np.arange(1), None))
    assert "convolution" in denoiser.lower(denoiser.plan.fullest()).as_text()


@pytest.mark.parametrize(
    ("asked", "job", "expected"),
    [
        ("single", JOB, "1 1 1"),
        ("data=2,cfg=2,rows=2", JOB, "2 2 2"),
        ("rows=8", make_job(shape=(4, 12, 8)), "1 1 2"),  # 12 rows, then 6
        # Images first, then the halves of guidance, then rows.
        ("auto", make_job(images_per_prompt=4), "4 2 1"),
        ("auto", make_job(images_per_prompt=1), "1 2 4"),
        ("auto", make_job(images_per_prompt=1, shape=(4, 16, 8), scale=1.0), "1 1 8"),
        ("auto", make_job(images_per_prompt=2, scale=1.0), "2 1 4"),
    ],
)
def test_the_mesh_of_a_job(
    checkpoint: Checkpoint, asked: str, job: DenoisingJob, expected: str
) -> None:
    class Accelerators(Devices):
        """Those on which `auto` splits rows."""

        @property
        def platform(self) -> str:
            return "tpu"

    devices = Accelerators(jax.devices(), True)
    mesh = settle_mesh(to_load(checkpoint), [job], RunOptions(mesh=asked), devices)
    assert " ".join(str(mesh.shape[axis]) for axis in ("data", "cfg", "rows")) == expected


def test_a_mesh_has_a_group_of_images_at_most(checkpoint: Checkpoint) -> None:
    options = RunOptions(mesh="auto", batch_size=1)
    mesh = settle_mesh(to_load(checkpoint), [make_job()], options, Devices.present())
    assert mesh.shape["data"] == 1
    with pytest.raises(BadSettingError, match="--mesh needs 64 devices"):
        denoise(Kept(), to_load(checkpoint), mesh="data=64")


def test_weights_that_do_not_fit_are_spread(
    checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each step gathers them, and gives what it gives with whole ones."""
    devices, options = Devices(jax.devices(), True, 10_000), RunOptions(mesh="rows=2")
    denoiser = load_jax_denoiser(to_load(checkpoint), [JOB], options, StageReport(2), devices, {})
    assert "each step gathers them over rows" in capsys.readouterr().out
    assert not denoiser.parameters["mid_block.resnets.0.conv1.weight"].is_fully_replicated
    found = start(denoiser, JOB)
    for _ in found.run():
        pass
    expected = denoise_by_diffusers(checkpoint, JOB, 0)
    assert relative_difference(found.latents()[0], expected) < ROUNDING
