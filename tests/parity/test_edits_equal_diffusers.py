"""Edits by instruction equal diffusers' InstructPix2Pix pipelines, whatever guides them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import BadSettingError
from common.sampling.sampler import REFUSALS
from common.sampling.schedulers import SCHEDULERS
from tests.in_process import Ours, make_config, pixel_difference, relative_difference
from tests.parity.parity_table import ParityTable
from tests.parity.test_pictures_equal_diffusers import PIPELINES, Way

PIPELINES |= {
    ("SDXL", "8 channels"): "StableDiffusionXLInstructPix2PixPipeline",
    ("SD", "8 channels"): "StableDiffusionInstructPix2PixPipeline",
}


@pytest.fixture(scope="module", params=["SDXL", pytest.param("SD", marks=pytest.mark.slow)])
def way(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Way:
    return Way(request.param, "8 channels", tmp_path_factory.mktemp("edit"))


@pytest.mark.parametrize(
    "scheduler",
    [
        s if s in ("euler_a", "dpmpp_2m") else pytest.param(s, marks=pytest.mark.slow)
        for s in SCHEDULERS
    ],
)
def test_every_scheduler_equals_diffusers(
    way: Way, scheduler: str, parity_table: ParityTable
) -> None:
    config = way.config(scheduler=scheduler, image_guidance_scale=1.7)
    cell = (f"from pictures, {way.family}, {way.kind}", scheduler, "edit")
    try:
        expected = way.by_diffusers(config, image_guidance_scale=1.7)
    except REFUSALS as error:
        with pytest.raises(BadSettingError):
            way.ours.denoise(config)
        parity_table.add(*cell, f"diffusers: {type(error).__name__}")
        return
    difference = relative_difference(way.ours.denoise(config), expected.numpy())
    parity_table.add(*cell, f"{difference:.0e}")
    assert difference < 1e-4


@pytest.mark.parametrize(
    ("text", "picture"), [(7.5, 1.0), (1.1, 3.0), (1.0, 1.5), (7.5, 0.9), (0.0, 0.0)]
)
def test_guidance_is_on_or_off_as_a_whole(way: Way, text: float, picture: float) -> None:
    config = way.config(scheduler="ddim", guidance_scale=text, image_guidance_scale=picture)
    expected = way.by_diffusers(config, image_guidance_scale=picture)
    assert relative_difference(way.ours.denoise(config), expected.numpy()) < 1e-4
    programs = [len(program.predictions) for program in way.ours.denoiser.plan.programs()]
    assert programs == ([3] if text > 1 and picture >= 1 else [1])


@pytest.mark.slow
@pytest.mark.long
def test_pixels_on_both_backends_and_eight_devices(way: Way) -> None:
    config = way.config(batch=2, scheduler="ddim")
    expected = np.stack([np.asarray(image) for image in way.by_diffusers(config, "pil")])
    for ours in (
        way.ours,
        Ours(way.model, backend="torch"),
        Ours(way.model, mesh="data=2,cfg=2,rows=2"),
    ):
        assert pixel_difference(ours.decode(ours.denoise(config)), expected) <= 2


def test_rescaling_and_cosxl(way: Way) -> None:
    """`is_cosxl_edit` of the checkpoint scales the picture's latents."""
    if way.family == "SD":
        pytest.skip("diffusers' pipeline for SD has neither")
    config = way.config(guidance_rescale=0.6)
    expected = way.by_diffusers(config, guidance_rescale=0.6)
    plain = way.ours.denoise(config)
    assert relative_difference(plain, expected.numpy()) < 1e-4
    index = Path(way.model) / "model_index.json"
    before = index.read_text()
    index.write_text(json.dumps(json.loads(before) | {"is_cosxl_edit": True}))
    way.pipeline.is_cosxl_edit = True
    try:
        expected = way.by_diffusers(config, guidance_rescale=0.6)
        found = Ours(way.model).denoise(config)
    finally:
        way.pipeline.is_cosxl_edit = False
        index.write_text(before)
    assert relative_difference(found, expected.numpy()) < 1e-4
    assert relative_difference(found, plain) > 1e-3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompts": [{"prompt": "x", "negative_prompt": ""}]}, "give --image"),
        ({"strength": 0.5}, "--strength is not for edits by instruction"),
        ({"outpaint": (8, 0, 0, 0)}, "--mask_image or --outpaint is not for edits"),
    ],
    ids=str,
)
def test_what_an_edit_does_not_take(way: Way, changes: dict[str, Any], words: str) -> None:
    from common.runs.jobs import refuse_unfit_inputs

    config = way.config(batch=1).model_copy(update=changes)
    if "prompts" in changes:
        config = make_config(way.model, **changes)
    with pytest.raises(BadSettingError, match=words):
        refuse_unfit_inputs(config, way.ours.checkpoint)
