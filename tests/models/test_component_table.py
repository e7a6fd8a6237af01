"""A component is one row: what has a row is checked, found, loaded, replaced, named by a flag."""

import inspect
import json
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import ControlNetModel
from safetensors.torch import save_file

from common.declared import EMBEDDINGS, LATENTS, PICTURES
from common.errors import BadInputFileError
from common.models.checkpoint import Checkpoint
from common.models.component_table import (
    COMPONENTS,
    PIPELINES,
    Component,
    config_misfit,
    index_misfit,
    loaded_for,
    text_encoders,
)
from tests.conftest import DEMO, PROJECT_DIR, Run
from tests.refusals import expect

# In a process of its own: the row is there before anything else is imported.
WITH_ANOTHER_ROW = """
import json, shutil, sys
from pathlib import Path
from common.models import component_table as table

class Config(table.ComponentConfig):
    conditioning_channels: table.Count

table.COMPONENTS += (
    table.Component(
        name="controlnet",
        title="ControlNet",
        classes=("ControlNetModel",),
        config=Config,
        supported={"global_pool_conditions": (False,)},
        loaded_for="latents",
        replaceable=True,
        lora_prefixes=("controlnet.", "lora_controlnet_"),
    ),
)
import torch
from diffusers import ControlNetModel
from common.errors import BadInputFileError, BadSettingError, StageError
from common.files.stage_table import STAGES
from common.models.find import open_checkpoint
from common.models.lora import lora_settings, parts_of
from common.models.model_settings import LoraFile
from common.models.text_pipeline import load_text_pipeline
from common.models.weights import load_model
from common.runs.flags import all_flags
from common.runs.generation import RunSettings

demo, controlnet, lora = sys.argv[1:]

def open_with(place):
    settings = RunSettings(model_id=demo, controlnet=place)
    return open_checkpoint(settings, table.loaded_for("latents"))

def said(call, error):
    try:
        call()
    except StageError as raised:
        assert type(raised) is error, raised
        return str(raised)
    raise AssertionError("it is not refused")

# Its flag, for the stages that settle or need it
(flag,) = (flag for flag in all_flags() if flag.name == "controlnet")
assert flag.text() == "Another ControlNet: folder, hub id, file."
assert [flag.is_of(stage) for stage in STAGES] == [True, False, True, False]

# Found as a replacement, and loaded by the stage; nothing where no checkpoint has one
assert open_with(None).components_for("latents") == ["unet", "scheduler"]
for place in (controlnet, str(Path(controlnet).parent)):
    checkpoint = open_with(place)
    assert checkpoint.components_for("latents") == ["unet", "scheduler", "controlnet"]
    assert checkpoint.components_for("pictures") == ["vae"]
    _, weights = load_model(checkpoint, "controlnet", torch.float32)
    found, expected = dict(weights), ControlNetModel.from_pretrained(controlnet).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
assert checkpoint.fingerprints_for("latents").keys() == {"unet", "scheduler", "controlnet"}
assert set(load_text_pipeline(checkpoint, torch.float32).components) >= {"text_encoder", "unet"}

# Its class and its config are checked
wrong = said(lambda: open_with(demo + "/vae"), BadSettingError)
assert "its controlnet is a AutoencoderKL" in wrong and wrong.endswith(": ControlNetModel"), wrong
config = json.loads(Path(controlnet, "config.json").read_text())
for change, error, words in (
    ({"conditioning_channels": "x"}, BadInputFileError, "conditioning_channels: Input should be"),
    ({"global_pool_conditions": True}, BadSettingError, "its ControlNet has global_pool"),
):
    Path(controlnet, "config.json").write_text(json.dumps(config | change))
    load = lambda: load_model(open_with(controlnet), "controlnet", torch.float32)
    assert words in said(load, error)

# A LoRA's layers for it are known
assert parts_of(LoraFile(file=lora)) == {"controlnet"}
assert len(lora_settings([LoraFile(file=lora)], table.loaded_for("latents"))) == 1
assert lora_settings([LoraFile(file=lora)], table.loaded_for("embeddings")) == []
"""


def test_a_component_is_one_row(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ControlNetModel(
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
        conditioning_embedding_out_channels=(4, 8),
    ).save_pretrained(tmp_path / "controlnet")
    lora = tmp_path / "lora.safetensors"
    save_file({"lora_controlnet_mid_block.lora_down.weight": torch.zeros(1, 2)}, lora)
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            WITH_ANOTHER_ROW,
            str(DEMO),
            str(tmp_path / "controlnet"),
            str(lora),
        ],
        capture_output=True,
        text=True,
        cwd=PROJECT_DIR,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", PIPELINES)
def test_every_part_of_diffusers_pipelines_has_a_row(name: str) -> None:
    """A part without one could be loaded and run unseen."""
    pipeline_class = getattr(diffusers, name)
    parameters = inspect.signature(pipeline_class).parameters.values()
    parts = {p.name for p in parameters if p.default is inspect.Parameter.empty}
    parts |= set(pipeline_class._optional_components)
    assert parts and parts <= {row.name for row in COMPONENTS}


@pytest.mark.parametrize("row", [row for row in COMPONENTS if row.classes], ids=lambda r: r.name)
def test_the_classes_of_a_row_are_its_librarys(row: Component) -> None:
    for name in row.classes:
        assert hasattr(import_module(row.library), name)
    if row.replaceable:  # by one file as well, which transformers does not read
        assert row.library == "diffusers"
        assert hasattr(getattr(diffusers, row.classes[0]), "from_single_file")


def test_every_stage_reads_its_own_components() -> None:
    assert {name: loaded_for(name) for name in (EMBEDDINGS, LATENTS, PICTURES)} == {
        EMBEDDINGS: ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2"),
        LATENTS: ("unet", "scheduler"),
        PICTURES: ("vae",),
    }


def test_only_text_encoders_have_weights_among_what_stage_1_loads() -> None:
    assert text_encoders() == ["text_encoder", "text_encoder_2"]


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("unet/config.json", {"sample_size": "x"}, "sample_size"),
        ("unet/config.json", {"block_out_channels": []}, "block_out_channels"),
        ("unet/config.json", {"cross_attention_dim": 10**12}, "cross_attention_dim"),
        ("unet/config.json", {"addition_time_embed_dim": None}, "addition_time_embed_dim"),
        ("vae/config.json", {"latent_channels": None}, "latent_channels"),
        ("scheduler/scheduler_config.json", {"_class_name": 3}, "_class_name"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**12}, "num_train_timesteps"),
        ("text_encoder/config.json", {"num_hidden_layers": 0}, "num_hidden_layers"),
        ("model_index.json", {"unet": "UNet"}, "unet: give a library and a class"),
    ],
)
def test_a_config_that_no_stage_can_use_is_named(
    file: str, change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    for name in ("model_index.json", file):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(DEMO / name, tmp_path / name)
    path = tmp_path / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    checkpoint = Checkpoint("m", tmp_path)
    component = path.parent.name
    with pytest.raises(BadInputFileError, match="cannot be used") as raised:
        checkpoint.index() if file == "model_index.json" else checkpoint.config(component)
    assert said in str(raised.value) and str(path) in str(raised.value)


def test_the_configs_of_the_checkpoints_here_pass() -> None:
    models = [path.parent for path in DEMO.parent.glob("*/model_index.json")]
    assert len(models) >= 4
    for model in models:
        assert index_misfit(json.loads((model / "model_index.json").read_text())) is None
        for path in model.glob("*/*config.json"):
            assert config_misfit(path.parent.name, json.loads(path.read_text())) is None


def test_a_checkpoint_of_another_pipeline_exits_2(
    tmp_path: Path, demo_copy: Path, stage: Run
) -> None:
    index = demo_copy / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionXLPipeline", "FluxPipeline"))
    result = stage(1, "--output_dir", tmp_path / "run", "--model_id", demo_copy)
    expect(result, 2, "FluxPipeline", "StableDiffusionXLPipeline")
    assert not (tmp_path / "run").exists()
