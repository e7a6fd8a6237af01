"""Settings in the web UI's words: read as others read them, and of pictures by others."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from sd_parsers import ParserManager

from common.errors import BadSettingError
from common.files.picture_files import encode_picture, web_ui_parameters
from common.serving.a1111_infotext import infotext_of, parse_infotext, told_of
from tests.refusals import refusal

NAMES = {
    **{"num_inference_steps": "Steps", "scheduler": "Sampler", "guidance_scale": "CFG scale"},
    **{"seed": "Seed", "model_id": "Model"},
}
SETTINGS = {
    **{"prompt": "a red star,\nlarge: very", "negative_prompt": "dark, blurry"},
    **{"num_inference_steps": 20, "scheduler": "Euler a", "guidance_scale": 7.5, "seed": 3},
    **{"model_id": 'a, "b"', "width": 64, "height": 48},
}
PIXELS = np.zeros((48, 64, 3), np.uint8)


@pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg"])
def test_what_a_picture_of_ours_says(suffix: str, tmp_path: Path) -> None:
    text = web_ui_parameters(SETTINGS, NAMES)
    data = encode_picture(PIXELS, suffix, {"settings": {}}, text)
    found, items = infotext_of(data)
    assert found == text and "parameters" not in items
    parsed = parse_infotext(found)
    assert (parsed["Prompt"], parsed["Negative prompt"]) == (
        SETTINGS["prompt"],
        SETTINGS["negative_prompt"],
    )
    expected = {name: str(SETTINGS[own]) for own, name in NAMES.items()}
    expected |= {"Size": "64x48", "Size-1": "64", "Size-2": "48"}
    assert {name: parsed[name] for name in expected} == expected


def test_it_is_read_as_another_parser_reads_it(tmp_path: Path) -> None:
    settings = SETTINGS | {"model_id": "demo"}
    data = encode_picture(PIXELS, ".png", {"settings": {}}, web_ui_parameters(settings, NAMES))
    (tmp_path / "a.png").write_bytes(data)
    theirs = ParserManager().parse(tmp_path / "a.png")
    assert theirs is not None
    ours = parse_infotext(infotext_of(data)[0])
    assert [prompt.value for prompt in theirs.prompts] == [ours["Prompt"]]
    assert [prompt.value for prompt in theirs.negative_prompts] == [ours["Negative prompt"]]
    (sampler,) = theirs.samplers
    assert (sampler.name, sampler.parameters["steps"]) == (ours["Sampler"], ours["Steps"])


def test_a_text_without_settings_is_a_prompt() -> None:
    assert parse_infotext("a star: red")["Prompt"] == "a star: red"
    found = parse_infotext("a\nNegative prompt: b\nc")
    assert (found["Prompt"], found["Negative prompt"]) == ("a", "b\nc")
    assert parse_infotext("Steps: 2, Seed: 1, Model: x")["Prompt"] == ""


@pytest.mark.parametrize("part", ["a", " ", ": ", 'aa:", ', "a: b, "])
def test_long_texts_are_read_at_once(part: str) -> None:
    """Where a pattern goes back again and again they take hours."""
    assert parse_infotext(part * 200_000)


def test_pictures_without_a_text_and_what_is_none() -> None:
    chunks, file = PngImagePlugin.PngInfo(), io.BytesIO()
    chunks.add_text("Title", "a")
    Image.fromarray(PIXELS).save(file, "PNG", pnginfo=chunks)
    assert infotext_of(file.getvalue()) == ("", {"Title": "a"})
    for data in (b"", b"GIF89a", file.getvalue()[:40]):
        with refusal(BadSettingError, "image is no PNG, JPEG or WebP that opens"):
            infotext_of(data)


def test_what_an_answer_tells(tmp_path: Path) -> None:
    (tmp_path / "images.jsonl").write_text(
        "".join(f'{{"file": "{k}.png", "seed": {k}, "fingerprint": "f"}}\n' for k in (7, 8))
    )
    files = [tmp_path / f"{k}.png" for k in (7, 8)]
    for path in files:
        path.write_bytes(encode_picture(PIXELS, ".png", {"settings": {}}, f"of {path.stem}"))
    told = told_of(tmp_path, files, {"prompt": "a", "negative_prompt": "b", "steps": 2})
    assert told["seed"] == 7 and told["all_seeds"] == [7, 8]
    assert told["infotexts"] == ["of 7", "of 8"] and told["all_prompts"] == ["a", "a"]
    assert (told["width"], told["height"], told["batch_size"]) == (64, 48, 2)
