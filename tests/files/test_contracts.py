"""What each file must hold for the next stage, and a checkpoint's configs for all of them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from common.errors import BadInputFileError
from common.files import artifacts
from common.files.artifacts import Artifact, Recipe, TensorLayout, make_header
from common.files.contracts import header_misfit
from common.models.checkpoint import Checkpoint
from common.models.component_table import config_misfit, index_misfit
from tests.conftest import DEMO

SETTINGS = {
    "prompts": ["a", "b"],
    "prompts_2": [None, None],
    "negative_prompts": ["", None],
    "negative_prompts_2": [None, None],
    "num_images_per_prompt": 2,
    "seeds": [1, 2, 3, 4],
}


def make_latents(stage: int = 2, images: int = 4, **changes: Any) -> Artifact:
    """Latents whose header names these settings; None takes one away."""
    settings = {k: v for k, v in (SETTINGS | changes).items() if v is not None}
    recipe = Recipe(stage=stage, settings=settings, inputs={}, weights={}, versions={})
    return Artifact(
        path=Path(artifacts.LATENTS_FILE),
        header=make_header(recipe, {}, ""),
        data_sha256="",
        tensors={"latents": TensorLayout("F32", (images, 4, 8, 8))},
    )


def test_a_header_that_fits_its_latents_passes() -> None:
    assert header_misfit(make_latents()) is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stage": 1}, "stage 1 made it"),
        ({"seeds": "none"}, "no usable seeds"),
        ({"prompts": [1, 2]}, "no usable prompts"),
        ({"num_images_per_prompt": None}, "no usable num_images_per_prompt"),
        ({"prompts_2": []}, "not as many prompts_2"),
        ({"seeds": [1, 2]}, "names 2 seeds"),
        ({"images": 3}, "latents of 3 images"),
    ],
)
def test_a_header_that_does_not_is_named(changes: dict[str, Any], said: str) -> None:
    assert said in str(header_misfit(make_latents(**changes)))


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
