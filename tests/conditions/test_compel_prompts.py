"""Prompts in compel's syntax; tests/parity has them beside compel and diffusers."""

from pathlib import Path
from typing import Any

import pytest
import torch

from common.conditions.prompts import encode_prompts
from common.errors import BadSettingError
from common.models.text_pipeline import load_text_pipeline
from tests.in_process import Ours, make_config
from tests.refusals import refusal
from tests.tiny_checkpoints import save_sdxl


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    model = save_sdxl(tmp_path_factory.mktemp("tiny") / "sdxl")
    return model, load_text_pipeline(Ours(model).checkpoint, torch.float32)


def encode(sdxl: tuple[Path, Any], **prompt: str | None) -> dict[str, torch.Tensor]:
    texts = [{"prompt": "a (red)1.3 star", "negative_prompt": "blurry", **prompt}]
    config = make_config(sdxl[0], prompts=texts, prompt_weighting="compel")
    return encode_prompts(sdxl[1], config)


def test_the_second_encoder_reads_its_own_text_or_the_firsts(sdxl: tuple[Path, Any]) -> None:
    plain, same = encode(sdxl), encode(sdxl, prompt_2="a (red)1.3 star")
    other = encode(sdxl, prompt_2="a ring")
    for name in ("prompt_embeds", "pooled_prompt_embeds"):
        assert torch.equal(plain[name], same[name])
        assert not torch.equal(plain[name], other[name])
    width = 32  # of the first encoder's states
    assert torch.equal(plain["prompt_embeds"][..., :width], other["prompt_embeds"][..., :width])


def test_no_negative_prompt_is_zeros(sdxl: tuple[Path, Any]) -> None:
    none, empty = encode(sdxl, negative_prompt=None), encode(sdxl, negative_prompt="")
    assert not none["negative_prompt_embeds"].any() and empty["negative_prompt_embeds"].any()
    assert torch.equal(none["prompt_embeds"], empty["prompt_embeds"])


def test_what_it_cannot_read_is_refused(sdxl: tuple[Path, Any]) -> None:
    with refusal(BadSettingError, "--prompt_weighting compel: compel cannot read the prompts"):
        encode(sdxl, prompt='("a star", "a ring").blend(1)')
