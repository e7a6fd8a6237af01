"""Pictures carry their settings, and damage to them is seen."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sd_parsers import ParserManager

from common.errors import BadInputFileError
from common.files import picture_files

SETTINGS = {
    "prompt": "a “red” star — 星",
    "negative_prompt": "blurry",
    "num_inference_steps": 25,
    "scheduler": "EulerDiscreteScheduler",
    "guidance_scale": 7.5,
    "seed": 42,
    "width": 24,
    "height": 16,
    "model_id": "models/demo",
    "vae_dtype": "float32",
}
WEB_UI = {
    "num_inference_steps": "Steps",
    "guidance_scale": "CFG scale",
    "seed": "Seed",
    "scheduler": "Sampler",
    "clip_skip": "Clip skip",
    "model_id": "Model",
}


def make_picture() -> tuple[np.ndarray, dict[str, object]]:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    record = {"settings": SETTINGS, "pixels_sha256": picture_files.hash_pixels(pixels)}
    return pixels, record


@pytest.mark.parametrize("ending", ["png", "webp", "jpg"])
def test_the_record_reads_back(tmp_path: Path, ending: str) -> None:
    pixels, record = make_picture()
    path = tmp_path / f"output_image.{ending}"
    path.write_bytes(picture_files.encode_picture(pixels, path.suffix, record, ""))
    assert picture_files.read_picture_record(path) == record
    with Image.open(path) as image:
        if ending != "jpg":
            assert np.array_equal(np.asarray(image.convert("RGB")), pixels)


def test_a_record_is_shortened_to_what_a_jpeg_holds(tmp_path: Path) -> None:
    pixels, record = make_picture()
    long = {"prompt": "a red star, " * 4000, "negative_prompt": "星" * 9000, "loras": ["x"] * 9000}
    record |= {"settings": SETTINGS | long, "overrides": {"seed": [1, 2]}}

    def text_of(settings: dict[str, Any]) -> str:
        return picture_files.web_ui_parameters(settings, WEB_UI)

    for ending in ("png", "webp"):
        assert picture_files.fit_record(record, f".{ending}", text_of) == (record, [])
    short, names = picture_files.fit_record(record, ".jpg", text_of)
    assert names == short["shortened"] == ["prompt", "negative_prompt", "loras"]
    assert short["settings"]["prompt"].startswith("a red star, a red star, ")
    assert short["settings"]["prompt"].endswith("…")
    assert short["settings"] | long == record["settings"]
    path = tmp_path / "output_image.jpg"
    path.write_bytes(
        picture_files.encode_picture(pixels, ".jpg", short, text_of(short["settings"]))
    )
    assert picture_files.read_picture_record(path) == short


READ_BACK = (
    "a red star",
    "a “red” star — 星, 🌟",
    "one line\nSteps: 3, Sampler: none of ours\nand another",
    "(a:1.2), [b], <lora:x:1> BREAK c",
    "x" * 5000,
)


@pytest.mark.parametrize("ending", ["png", "webp", "jpg"])
@pytest.mark.parametrize("prompt", READ_BACK)
def test_the_settings_are_read_by_others(
    tmp_path: Path, ending: str, prompt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By sd-parsers, as what AUTOMATIC1111's web UI writes."""
    # It takes another picture at the same address in memory for the one before.
    monkeypatch.setattr("sd_parsers.extractors._jpeg_usercomment._image_id", None)
    pixels, record = make_picture()
    settings = SETTINGS | {"scheduler": "DPM++ 2M Karras", "prompt": prompt, "clip_skip": 2}
    text = picture_files.web_ui_parameters(settings, WEB_UI)
    path = tmp_path / f"picture.{ending}"
    path.write_bytes(picture_files.encode_picture(pixels, path.suffix, record, text))
    found = ParserManager().parse(path)
    assert found is not None and found.generator.name == "AUTOMATIC1111"
    assert [each.value for each in found.prompts] == [prompt]
    assert [each.value for each in found.negative_prompts] == ["blurry"]
    (sampler,) = found.samplers
    assert sampler.name == "DPM++ 2M Karras"
    assert sampler.parameters == {"cfg_scale": "7.5", "seed": "42", "steps": "25"}
    assert [model.name for model in found.models] == ["models/demo"]
    assert found.metadata["Size"] == "24x16" and found.metadata["Clip skip"] == "2"


def test_png_has_the_text_that_web_uis_read(tmp_path: Path) -> None:
    pixels, record = make_picture()
    path = tmp_path / "output_image.png"
    path.write_bytes(picture_files.encode_picture(pixels, ".png", record, "some text — 星"))
    with Image.open(path) as image:
        assert image.info["parameters"] == "some text — 星"


@pytest.mark.parametrize(
    ("changes", "last_line"),
    [
        ({}, "Steps: 25, Sampler: Euler a, CFG scale: 7.5, Seed: 42, Size: 24x16, "
         "Model: models/demo"),
        ({"num_inference_steps": None, "timesteps": [999, 500], "seed": None, "clip_skip": 2},
         "Steps: 2, Sampler: Euler a, CFG scale: 7.5, Size: 24x16, Model: models/demo, "
         "Clip skip: 2"),
        ({"num_inference_steps": None, "sigmas": [14.0, 3.0, 1.0, 0.0], "model_id": None},
         "Steps: 3, Sampler: Euler a, CFG scale: 7.5, Seed: 42, Size: 24x16"),
    ],
)  # fmt: skip
def test_settings_as_web_uis_write_them(changes: dict[str, object], last_line: str) -> None:
    text = picture_files.web_ui_parameters(SETTINGS | {"scheduler": "Euler a"} | changes, WEB_UI)
    assert text == f"a “red” star — 星\nNegative prompt: blurry\n{last_line}"


@pytest.mark.parametrize("ending", ["png", "webp", "jpg"])
def test_a_picture_of_an_older_version_is_refused(
    tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first version's records named no version."""
    pixels, record = make_picture()
    path = tmp_path / f"output_image.{ending}"
    monkeypatch.setattr(picture_files, "_to_text", lambda record: json.dumps(record))
    path.write_bytes(picture_files.encode_picture(pixels, path.suffix, record, ""))
    with pytest.raises(BadInputFileError) as caught:
        picture_files.read_picture_record(path)
    assert str(caught.value) == (
        f"{path} was made by an older version of this program; make it again: python "
        f"stages/stage3_vae_decoder.py --output_dir {tmp_path}"
    )


@pytest.mark.parametrize("ending", ["png", "webp", "jpg"])
def test_a_damaged_picture_has_no_record(tmp_path: Path, ending: str) -> None:
    pixels, record = make_picture()
    path = tmp_path / f"output_image.{ending}"
    path.write_bytes(picture_files.encode_picture(pixels, path.suffix, record, ""))
    path.write_bytes(path.read_bytes()[:200])
    assert picture_files.read_picture_record(path) is None
    path.write_bytes(b"")
    assert picture_files.read_picture_record(path) is None


def test_a_retouched_png_is_seen(tmp_path: Path) -> None:
    pixels, record = make_picture()
    path = tmp_path / "output_image.png"
    retouched = pixels.copy()
    retouched[3, 3, 0] ^= 1
    path.write_bytes(picture_files.encode_picture(retouched, path.suffix, record, ""))
    assert picture_files.read_picture_record(path) is None


@pytest.mark.parametrize("count", [2, 9_999, 10_000, 10_001, 123_456])
def test_names_sort_as_the_pictures_do(count: int) -> None:
    names = picture_files.numbered("output_image", count, "png")
    grids = picture_files.grid_names(count, 1, "png")
    for some in (names, grids):
        assert sorted(some) == some and len({*some}) == count
        assert all(picture_files.OUR_NAME.fullmatch(name) for name in some[-3:])
    assert names[1] == "output_image_0001.png" or count > 10_000


@pytest.mark.parametrize(
    ("count", "grid_images", "names"),
    [
        (1, 100, []),
        (2, 0, []),
        (2, 2, ["output_grid.webp"]),
        (201, 100, [f"output_grid_000{k}.webp" for k in range(3)]),
    ],
)
def test_grids_have_pages(count: int, grid_images: int, names: list[str]) -> None:
    assert picture_files.grid_names(count, grid_images, "webp") == names


def test_pixels_are_those_of_the_files(tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (2, 5, 7, 3), np.uint8)
    paths = [tmp_path / f"{k}.png" for k in range(2)]
    for path, image in zip(paths, pixels, strict=True):
        Image.fromarray(image).save(path)
    for path, image in zip(paths, pixels, strict=True):
        np.testing.assert_array_equal(picture_files.read_pixels(path), image)
    assert picture_files.picture_shape(paths[0]) == (5, 7, 3)


def test_a_grid_of_several_heights_names_no_size() -> None:
    """Its settings are those that all of its pictures have."""
    settings = {name: value for name, value in SETTINGS.items() if name != "height"}
    assert "Size" in picture_files.web_ui_parameters(SETTINGS, WEB_UI)
    assert "Size" not in picture_files.web_ui_parameters(settings, WEB_UI)
