"""Weights reach the devices unchanged, and the host never holds them twice."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from common.compute.devices import Devices
from common.compute.fast_ops import arrange_weight
from common.compute.sharding import SINGLE, make_mesh, replicated
from common.errors import BadInputFileError
from common.models.checkpoint import Checkpoint
from common.models.find import open_checkpoint
from common.models.weights import load_model, with_weights
from common.runs.generation import RunSettings
from tests.conftest import DEMO, PROJECT_DIR
from tests.refusals import refusal
from tests.tiny_checkpoints import save_sd


def open_with(**settings: str) -> Checkpoint:
    return open_checkpoint(RunSettings(model_id=str(DEMO), **settings), ["unet", "vae"])  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_in_shards_are_read_one_by_one(dtype: torch.dtype, tmp_path: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(DEMO / "unet")
    unet.save_pretrained(tmp_path / "unet", max_shard_size="4MB")
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 3
    expected = unet.to(dtype).state_dict()
    module, tensors = load_model(open_with(unet=str(tmp_path / "unet")), "unet", dtype)
    found = dict(tensors)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert all(tensor.dtype == dtype for tensor in found.values())
    assert all(parameter.is_meta for parameter in module.parameters())


WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("name", ["unet", "vae"])
@pytest.mark.parametrize("form", ["folder", "file"])
def test_weights_that_are_no_safetensors(demo_copy: Path, name: str, form: str) -> None:
    file = demo_copy / name / WEIGHTS
    file.write_bytes(b"none")
    source = file if form == "file" else demo_copy / name
    settings = RunSettings.model_validate({"model_id": str(DEMO), name: str(source)})
    with refusal(BadInputFileError, f"{file} is damaged or cut short", "get it again"):
        load_model(open_checkpoint(settings, [name]), name, torch.float32)


def test_weights_for_torch_are_in_memory_before_the_first_step(tmp_path: Path) -> None:
    """Mapped from their file, not copied, and every page of them there."""
    UNet2DConditionModel.from_pretrained(DEMO / "unet").float().save_pretrained(tmp_path / "unet")
    process = psutil.Process()
    module, weights = load_model(open_with(unet=str(tmp_path / "unet")), "unet", torch.float32)
    before = process.memory_info()
    module = with_weights(module, weights)
    after = process.memory_info()
    size = sum(parameter.nbytes for parameter in module.parameters())
    assert after.shared - before.shared > 0.9 * size
    assert (after.rss - after.shared) - (before.rss - before.shared) < 0.2 * size


def test_weights_under_older_names_are_read_as_diffusers_reads_them(tmp_path: Path) -> None:
    """Attention of VAEs was once query, key, value, proj_attn; diffusers renames them."""
    model = save_sd(tmp_path / "model")
    file = model / "vae" / "diffusion_pytorch_model.safetensors"
    expected = AutoencoderKL.from_pretrained(model / "vae").state_dict()
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(file)
    for new, old in older.items():
        tensors = {
            name.replace(f"attentions.0.{new}", f"attentions.0.{old}"): tensor.clone()
            for name, tensor in tensors.items()
        }
    assert any("query" in name for name in tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    checkpoint = open_checkpoint(RunSettings(model_id=str(model)), ["vae"])
    found = dict(load_model(checkpoint, "vae", torch.float32)[1])
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_devices_of_a_cpu_share_one_copy() -> None:
    devices = Devices.present()
    mesh = make_mesh(SINGLE | {"data": 2}, devices.devices)
    _, weights = load_model(open_with(), "unet", torch.float32)
    tensors = dict(weights)
    arrange = partial(arrange_weight, operations="fast", platform="gpu")
    parameters = devices.put_weights(tensors.items(), lambda *_: replicated(mesh), arrange=arrange)
    assert parameters.keys() == tensors.keys()
    for name, array in parameters.items():
        first, second = (shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards)
        assert first == second
        expected = tensors[name].numpy()
        if expected.ndim == 4:
            expected = expected.transpose(2, 3, 1, 0)
        assert np.array_equal(array, expected)


LOAD = """
import sys, threading, time
import torch
from common.models.find import open_checkpoint
from common.models.weights import load_model
from common.runs.generation import RunSettings
from common.compute import jax_start, sharding
from common.compute.clock import StageReport, own_memory
from common.compute.devices import Devices
from common.compute.fast_ops import arrange_weight

jax_start.set_up_jax()
devices = Devices.present()
mesh = sharding.make_mesh(sharding.SINGLE, devices.devices)
checkpoint = open_checkpoint(RunSettings(model_id=sys.argv[1], unet=sys.argv[2]), ["unet"])
_, weights = load_model(checkpoint, "unet", torch.float16)
before, most, going = own_memory(), [0], [True]

def sample():
    while going[0]:
        most[0] = max(most[0], own_memory() - before)
        time.sleep(0.001)

thread = threading.Thread(target=sample)
thread.start()
report = StageReport(2)
parameters = devices.put_weights(
    report.watch_memory(weights),
    lambda *_: sharding.replicated(mesh),
    arrange=lambda name, array: arrange_weight(name, array, operations="fast", platform="gpu"),
)
going[0] = False
thread.join()
print({array.dtype.name for array in parameters.values()})
print(sum(array.nbytes for array in parameters.values()), most[0])
print(report.facts["weights_bytes"], report.facts["host_bytes_while_loading"])
"""


@pytest.mark.slow
@pytest.mark.long
def test_a_unet_of_two_gigabytes_takes_little_more_than_its_device_copy(tmp_path: Path) -> None:
    """Measured by a thread of its own, beside what the stage reports."""
    folder = tmp_path / "unet"
    folder.mkdir()
    config = json.loads((PROJECT_DIR / "models/sdxl_base/unet/config.json").read_text())
    config |= {"transformer_layers_per_block": [1, 2, 4]}
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        module = UNet2DConditionModel.from_config(config)
    tensors = {
        name: torch.full(tensor.shape, 0.5, dtype=torch.float16)
        for name, tensor in module.state_dict().items()
    }
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert size >= 2e9
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    del tensors
    result = subprocess.run(
        [sys.executable, "-c", LOAD, str(DEMO), str(folder)],
        capture_output=True,
        text=True,
        cwd=PROJECT_DIR,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    dtypes, measured, reported = result.stdout.splitlines()[-3:]
    assert dtypes == "{'float16'}"
    on_device, most = map(int, measured.split())
    assert on_device == size
    assert most <= 1.3 * size  # the device copy lies in the host's own memory here
    weights_bytes, while_loading = map(int, reported.split())
    assert weights_bytes == size
    assert abs(while_loading - most) < 0.1 * size
