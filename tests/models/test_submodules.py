"""What a UNet computes of the prompt alone is computed once and given to every step."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from common.models.submodules import bypassed, prompt_projections
from tests.conftest import DEMO


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(DEMO / "unet").float().eval()


def run(unet: UNet2DConditionModel, prompt: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(5)
    x = torch.randn(1, 4, 16, 16)
    added = {"text_embeds": torch.randn(1, 96), "time_ids": torch.ones(1, 6)}
    with torch.no_grad():
        return unet(x, 500, prompt, added_cond_kwargs=added).sample


def test_a_unet_with_its_projections_given_gives_the_same_bits(unet: UNet2DConditionModel) -> None:
    """It then reads the prompt nowhere else: another one changes nothing."""
    prompt, other = torch.randn(1, 77, 160), torch.randn(1, 77, 160)
    expected = run(unet, prompt)
    assert not torch.equal(run(unet, other), expected)
    projections = prompt_projections(unet)
    with torch.no_grad():
        given = {name: module(prompt) for name, module in projections.items()}
    with bypassed(unet, given):
        assert torch.equal(run(unet, other), expected)
    assert not torch.equal(run(unet, other), expected)


def test_every_cross_attention_has_two_projections(unet: UNet2DConditionModel) -> None:
    cross_attentions = [name for name, _ in unet.named_modules() if name.endswith(".attn2")]
    assert cross_attentions
    expected = {f"{name}.{kind}" for name in cross_attentions for kind in ("to_k", "to_v")}
    assert prompt_projections(unet).keys() == expected


def test_submodules_come_back_after_an_error(unet: UNet2DConditionModel) -> None:
    name, module = next(iter(prompt_projections(unet).items()))
    prompt = torch.randn(1, 77, 160)
    expected = module(prompt)
    with pytest.raises(KeyError), bypassed(unet, {name: torch.zeros(1)}):
        assert torch.equal(module(prompt), torch.zeros(1))
        raise KeyError
    assert torch.equal(module(prompt), expected)
