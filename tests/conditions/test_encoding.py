"""What stage 1 refuses before it encodes, and how often it encodes to measure."""

from pathlib import Path
from typing import Any

import pytest
import torch

from common.compute.clock import StageReport
from common.compute.options import RunOptions
from common.conditions.encoding import check_prompt_options, measure_encoding
from common.errors import BadSettingError
from common.models.checkpoint import Checkpoint
from common.models.find import open_checkpoint
from common.models.text_pipeline import load_text_pipeline
from tests.configs import make_config
from tests.conftest import DEMO
from tests.refusals import refusal
from tests.tiny_checkpoints import save_sd


def prompt(**texts: str) -> dict[str, Any]:
    return {"prompt": "a ring", "negative_prompt": "blurry", **texts}


@pytest.fixture(scope="module")
def of_one_encoder(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A checkpoint with one text encoder, of three layers."""
    model = save_sd(tmp_path_factory.mktemp("models") / "sd")
    return open_checkpoint(make_config(model), ["tokenizer", "text_encoder"])


@pytest.fixture(scope="module")
def of_two_encoders() -> Checkpoint:
    """The demo checkpoint, whose text encoders have the layers that its configs name."""
    return open_checkpoint(make_config(DEMO), ["text_encoder", "text_encoder_2"])


@pytest.mark.parametrize("name", ["prompt_2", "negative_prompt_2"])
def test_second_prompts_need_a_second_encoder(
    of_one_encoder: Checkpoint, of_two_encoders: Checkpoint, name: str
) -> None:
    config = make_config(DEMO, prompts=[prompt(), prompt(**{name: "x"})])
    check_prompt_options(config, of_two_encoders)
    with refusal(BadSettingError, f"--{name} is for checkpoints with two text encoders"):
        check_prompt_options(config, of_one_encoder)


def test_layers_that_are_left_out_are_there(
    of_one_encoder: Checkpoint, of_two_encoders: Checkpoint
) -> None:
    """diffusers reads SDXL's states one layer earlier."""
    names = ("text_encoder", "text_encoder_2")
    least = min(of_two_encoders.config(name)["num_hidden_layers"] for name in names)
    for checkpoint, most in ((of_one_encoder, 3), (of_two_encoders, least - 1)):
        check_prompt_options(make_config(DEMO, clip_skip=most), checkpoint)
        with refusal(BadSettingError, f"--clip_skip {most + 1} is more than", f"at most {most}"):
            check_prompt_options(make_config(DEMO, clip_skip=most + 1), checkpoint)


def test_layers_and_weights_do_not_go_together(of_two_encoders: Checkpoint) -> None:
    config = make_config(DEMO, clip_skip=1, prompt_weighting="compel")
    with refusal(BadSettingError, "--clip_skip and --prompt_weighting"):
        check_prompt_options(config, of_two_encoders)


def test_it_encodes_as_often_as_it_is_asked_to(of_one_encoder: Checkpoint, tmp_path: Path) -> None:
    pipeline, report = load_text_pipeline(of_one_encoder, torch.float32), StageReport(1)
    config = make_config(DEMO)
    assert measure_encoding(lambda: pipeline, config, RunOptions(), report, tmp_path) is None
    assert report.repeats == []
    options = RunOptions(repeat=2, profile=True)
    profile = measure_encoding(lambda: pipeline, config, options, report, tmp_path)
    assert len(report.repeats) == 2
    assert profile is not None and profile.operations
    assert list(tmp_path.glob("encode.pt.trace.json*"))
