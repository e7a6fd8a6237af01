"""The pictures of a run: what is read of them, and what stage 0's file must be."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import BadInputFileError
from common.files import artifacts, row_reader
from common.files.artifacts import Artifact
from common.files.stage_table import IMAGE_LATENTS_FILE
from common.models.find import open_checkpoint
from common.runs.generation import GenerationConfig
from common.runs.image_latents import find_image_latents, image_tensors, input_names, read_inputs
from common.runs.recipes import image_latents_recipe
from common.vae.encoder import Posterior
from tests.configs import make_config
from tests.conftest import DEMO
from tests.refusals import refusal

PROMPT = {"prompt": "x", "negative_prompt": ""}
SIZE = {"height": 32, "width": 48}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("a.png", "b.png")):
        Image.fromarray(np.full((32, 48, 3), 100 + number, np.uint8)).save(name)
    mask = np.zeros((32, 48), np.uint8)
    Image.fromarray(mask).save("black.png")
    Image.fromarray(mask[:16]).save("small.png")
    mask[:8] = 255
    Image.fromarray(mask).save("mask.png")
    mask[8:16] = 200
    Image.fromarray(mask).save("soft.png")
    Image.fromarray(mask // 4).save("dark.png")
    return tmp_path


def config_of(*prompts: dict[str, Any], **settings: Any) -> GenerationConfig:
    return make_config(DEMO, prompts=[PROMPT | each for each in prompts], **SIZE, **settings)


def write(folder: Path, config: GenerationConfig, **provenance: Any) -> Artifact:
    """What stage 0 writes, with posteriors of zeros."""
    checkpoint = open_checkpoint(config, ("vae",))
    inputs = read_inputs(config)
    laid = inputs.lay(config, 8)
    cells = np.zeros((len(inputs.pictures), 4, 4, 6), np.float32)
    encoded = {name: Posterior(mean=cells + 1, std=cells + 2) for name in laid.to_encode()}
    tensors = image_tensors(laid, inputs, encoded, 8)
    recipe = image_latents_recipe(config, checkpoint, inputs, "float32")
    names = {"images": inputs.names, "mask_images": inputs.mask_names, **provenance}
    artifacts.save_tensors(folder / IMAGE_LATENTS_FILE, tensors, recipe, names)
    return artifacts.inspect(folder / IMAGE_LATENTS_FILE)


def find(folder: Path, config: GenerationConfig) -> Artifact | None:
    checkpoint = open_checkpoint(config, ("unet", "vae"))
    return find_image_latents(config, checkpoint, folder, verify=True)


def test_the_same_for_all_prompts_is_read_once(folder: Path) -> None:
    assert input_names(config_of({"image": "a.png"}, {"image": "a.png"})) == (["a.png"], [])
    two = config_of({"image": "a.png"}, {"image": "b.png"})
    assert input_names(two) == (["a.png", "b.png"], [])
    assert [int(each.max()) for each in read_inputs(two).pictures] == [100, 101]
    pair = {"image": "a.png", "mask_image": "mask.png"}
    assert input_names(config_of(pair, pair)) == (["a.png"], ["mask.png"])


def test_what_is_made_anew_is_a_mask(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read = read_inputs(config_of({"image": "a.png", "mask_image": "mask.png"}))
    assert capsys.readouterr().out == ""
    assert (read.masks[0] == 255).sum() == 8 * 48
    read_inputs(config_of({"image": "a.png", "mask_image": "soft.png"}))
    assert "soft.png: 25.0% of it is grey" in capsys.readouterr().out
    read_inputs(config_of({"image": "a.png", "mask_image": "soft.png"}, soft_mask=True))
    assert capsys.readouterr().out == ""
    wide = read_inputs(config_of({"image": "a.png"}, outpaint=(8, 0, 0, 4)))
    assert wide.pictures[0].shape == (36, 56, 3) and wide.masks[0].shape == (36, 56)
    assert not wide.masks[0][:32, 8:].any() and wide.masks[0].sum() == 255 * (36 * 8 + 4 * 48)


def test_masks_that_cannot_be(folder: Path) -> None:
    with refusal(BadInputFileError, "--mask_image black.png masks nothing"):
        read_inputs(config_of({"image": "a.png", "mask_image": "black.png"}))
    dark = {"image": "a.png", "mask_image": "dark.png"}
    with refusal(BadInputFileError, "--mask_image dark.png masks nothing"):
        read_inputs(config_of(dark))
    assert read_inputs(config_of(dark, soft_mask=True)).masks[0].max() == 63
    with refusal(BadInputFileError, "small.png is 48×16, its picture 48×32"):
        read_inputs(config_of({"image": "a.png", "mask_image": "small.png"}))


def test_tensors_are_the_pictures(folder: Path) -> None:
    config = config_of({"image": "a.png", "mask_image": "mask.png"}, padding_mask_crop=2)
    found = write(folder, config)
    assert found.header is not None
    tensors = row_reader.load_tensors(found, print)
    assert tensors["pictures"].dtype == torch.uint8 and (tensors["pictures"] == 100).all()
    assert tensors["whole_masks"].shape == (1, 32, 48) and tensors["crops"].shape == (1, 4)
    assert tensors["latent_masks"].unique().tolist() == [0, 1] or tensors["latent_masks"].all()


def test_a_file_of_other_pictures_is_refused(folder: Path) -> None:
    config = config_of({"image": "a.png"})
    with refusal(BadInputFileError, IMAGE_LATENTS_FILE, "stage0_image_encoder.py"):
        find(folder, config)
    write(folder, config)
    assert find(folder, config) is not None
    assert find(folder, config_of({})) is None  # a run without pictures
    with refusal(BadInputFileError, "was made of other images", "b.png"):
        find(folder, config_of({"image": "b.png"}))
    with refusal(BadInputFileError, "lacks masked_image_latents_mean"):
        find(folder, config_of({"image": "a.png", "mask_image": "mask.png"}))
    larger = config.model_copy(update={"height": 64})
    with refusal(BadInputFileError, "the run is of 48×64 pixels"):
        find(folder, larger)
