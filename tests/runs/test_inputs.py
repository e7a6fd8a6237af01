"""Which picture each prompt begins with, and what does not go together."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from common.errors import BadInputFileError, BadSettingError
from common.runs.generation import GenerationConfig, RunSettings, resolve
from tests.refusals import refusal


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """a.png to c.png of 48×32 in `pictures`, d.png of 51×37 beside them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    for name in ("pictures/a.png", "pictures/b.png", "pictures/c.png"):
        Image.fromarray(np.zeros((32, 48, 3), np.uint8)).save(name)
    Image.fromarray(np.zeros((37, 51, 3), np.uint8)).save("d.png")
    return tmp_path


def resolved(**values: Any) -> GenerationConfig:
    settings = RunSettings.model_validate(values)
    return resolve(settings, native_size=128, size_factor=8)


def images(config: GenerationConfig) -> list[str | None]:
    return [prompt.image for prompt in config.prompts]


def test_one_for_all_one_each_or_one_prompt_for_several(folder: Path) -> None:
    config = resolved(prompt=["x", "y"], image="d.png")
    assert images(config) == ["d.png"] * 2 and (config.height, config.width) == (32, 48)
    config = resolved(prompt=["x", "y", "z"], image="pictures")
    assert images(config) == ["pictures/a.png", "pictures/b.png", "pictures/c.png"]
    assert (config.height, config.width) == (32, 48)
    config = resolved(prompt="x", image=["pictures/b.png", "pictures/a.png"])
    assert images(config) == ["pictures/b.png", "pictures/a.png"]
    assert [prompt.prompt for prompt in config.prompts] == ["x", "x"]
    with refusal(BadSettingError, "--image names 3 pictures for 2 prompts"):
        resolved(prompt=["x", "y"], image="pictures")


def test_a_prompts_file_has_its_own(folder: Path) -> None:
    lines = ['{"prompt": "x", "image": "pictures/a.png"}', '{"prompt": "y"}']
    Path("prompts.jsonl").write_text("\n".join(lines))
    assert images(resolved(prompts_file="prompts.jsonl", image="pictures/b.png")) == [
        "pictures/a.png",
        "pictures/b.png",
    ]
    with refusal(BadSettingError, "prompt 2 has no image, and others have"):
        resolved(prompts_file="prompts.jsonl")


def test_an_id_is_numbered_where_its_prompt_is_repeated(folder: Path) -> None:
    Path("prompts.jsonl").write_text('{"prompt": "a", "id": "star"}')
    config = resolved(prompts_file="prompts.jsonl", image=["pictures/a.png", "pictures/b.png"])
    assert [prompt.id for prompt in config.prompts] == ["star_0000", "star_0001"]
    assert len({*config.image_seeds()}) == 2


def test_the_size_is_the_pictures_own(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = resolved(image="d.png")
    assert (config.height, config.width) == (32, 48)
    assert "51×37 are brought to 48×32" in capsys.readouterr().out
    config = resolved(image="pictures/a.png", outpaint="8,0,16,8")
    assert (config.height, config.width) == (40, 72)
    config = resolved(image="d.png", width=64)
    assert (config.height, config.width) == (32, 64)
    both = ["pictures/a.png", "d.png"]
    with refusal(BadSettingError, "2 sizes", "d.png 51×37", "--height and --width"):
        resolved(image=both)
    config = resolved(image=both, height=64, width=96)
    assert (config.height, config.width) == (64, 96)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"mask_image": "d.png"}, "mask_image is for pictures"),
        ({"outpaint": "8,0,0,0"}, "outpaint is for pictures"),
        ({"image": "d.png", "keep_unmasked": True}, "keep_unmasked is for masks"),
        ({"image": "d.png", "soft_mask": True}, "soft_mask is for masks"),
        ({"image": "d.png", "padding_mask_crop": 3}, "padding_mask_crop is for masks"),
        (
            {"image": "d.png", "mask_image": "d.png", "outpaint": "8,0,0,0"},
            "outpaint makes its own mask",
        ),
        ({"image": "d.png", "init_latents": "x"}, "either image or init_latents"),
        ({"image": "d.png", "denoising_start": 0.5}, "denoising_start goes on from latents"),
        ({"strength": 0.5}, "strength is for what a run begins with"),
        ({"image": ["d.png", "d.png"], "mask_image": ["d.png"] * 3}, "names 3 pictures for 2"),
    ],
    ids=str,
)
def test_what_does_not_go_together(folder: Path, values: dict[str, Any], words: str) -> None:
    with pytest.raises((BadSettingError, ValueError), match=words):
        resolved(**values)


@pytest.mark.parametrize(("width", "height"), [(5, 5), (20_000, 16)])
def test_a_picture_of_no_size_for_a_run(tmp_path: Path, width: int, height: int) -> None:
    path = tmp_path / "odd.png"
    Image.new("L", (width, height)).save(path)
    with refusal(BadSettingError, f"--image: {path} gives pictures of {width}×{height}"):
        resolved(image=str(path))
    assert resolved(image=str(path), height=64, width=64).height == 64


def test_a_picture_that_is_not_there(folder: Path) -> None:
    with refusal(BadInputFileError, "--image nowhere.png is not there"):
        resolved(image="nowhere.png")
