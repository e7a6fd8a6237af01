"""What clients of the web UI's API ask for, in settings of ours; what is refused, and why."""

import base64
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError
from webuiapi import WebUIApi
from webuiapi.webuiapi import b64_img

from common.errors import BadSettingError
from common.files.input_pictures import read_picture
from common.serving import a1111_requests
from common.serving.a1111_requests import PictureRequest, TextRequest
from common.serving.request_pictures import decoded
from tests.refusals import refusal

MOST = 1_000_000
PICTURE = np.random.default_rng(5).integers(0, 256, (32, 48, 3), np.uint8)
MASK = np.zeros((32, 48), np.uint8)
MASK[8:24, 8:40] = 255


class Client(WebUIApi):
    """webuiapi's, of which only what it sends is looked at."""

    def check_extensions(self) -> None:
        """It asks a server."""

    def post_and_get_api_result(self, url: str, json: dict[str, Any], use_async: bool) -> Any:
        return json


def sent(how: str, **asked: Any) -> dict[str, Any]:
    found = getattr(Client(), how)(**asked)
    assert isinstance(found, dict)
    return found


def encoded(pixels: np.ndarray) -> str:
    return b64_img(Image.fromarray(pixels))


def test_what_the_client_sends_by_itself_asks_for_nothing_that_is_not_here() -> None:
    flags = TextRequest.model_validate(sent("txt2img", prompt="a (red:1.2) star", seed=7)).flags()
    assert flags == {
        "prompt": ["a (red:1.2) star"],
        "negative_prompt": "",
        "prompt_weighting": "a1111",
        "long_prompts": "chunk",
        "seed": 7,
        "num_inference_steps": 20,
        "guidance_scale": 7.0,
        "width": 512,
        "height": 512,
        "num_images_per_prompt": 1,
        "clip_skip": None,
        "image_format": None,
        "scheduler": "euler_a",
        "scheduler_option": [],
        "eta": 0.0,
    }
    asked = sent("img2img", prompt="a", images=[Image.fromarray(PICTURE)])
    found = PictureRequest.model_validate(asked).flags()
    assert (found["strength"], found["resize_mode"]) == (0.75, "default")
    assert "keep_unmasked" not in found and "padding_mask_crop" not in found


def test_nulls_are_defaults_and_seeds_are_chosen() -> None:
    fields = {*TextRequest.model_fields, *a1111_requests.NEUTRAL, *a1111_requests.IDLE}
    of_nulls = TextRequest.model_validate(dict.fromkeys(fields))
    assert of_nulls == TextRequest()
    assert of_nulls.flags()["seed"] != of_nulls.flags()["seed"]
    assert TextRequest(seed=0).flags()["seed"] == 0


def test_settings_of_one_request() -> None:
    options = {"CLIP_stop_at_last_layers": 2, "samples_format": "jpeg", "sd_vae": "Automatic"}
    asked = sent("txt2img", sampler_name="DDIM", batch_size=2, n_iter=3, override_settings=options)
    flags = TextRequest.model_validate(asked).flags()
    assert (flags["clip_skip"], flags["image_format"]) == (1, "jpg")
    assert (flags["scheduler"], flags["eta"], flags["num_images_per_prompt"]) == ("ddim", 1.0, 6)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("enable_hr", True), ("restore_faces", True), ("tiling", True), ("styles", ["a"])),
        *(("subseed_strength", 0.3), ("s_churn", 1), ("s_noise", 1.1), ("script_name", "X/Y")),
        *(("alwayson_scripts", {"ADetailer": {"args": []}}), ("refiner_checkpoint", "b")),
        *(("firstphase_width", 64), ("seed_resize_from_h", 64), ("sharpness", 3)),
    ],
)
def test_what_would_change_the_picture_and_is_not_here(field: str, value: object) -> None:
    with refusal(BadSettingError, field, "leave it out"):
        TextRequest.model_validate({"prompt": "a", field: value}).flags()


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("a <lora:x:0.5:1> star", "prompt: <lora:x:0.5:1> is not supported"),
        ("a <hypernet:x:0.5> star", "prompt: <hypernet:x:0.5> is not supported"),
        ("a [red:blue:0.5] star", "prompt: '[red:blue:0.5]' stands for several prompts"),
        ("a [:blue:3]", "prompt: '[:blue:3]' stands for"),
        ("a [red|blue] star", "prompt: '[red|blue]' stands for"),
        ("a star AND a ring", "prompt: 'AND' stands for"),
    ],
)
def test_prompts_that_are_not_read(prompt: str, said: str) -> None:
    with refusal(BadSettingError, said):
        TextRequest(prompt=prompt).flags()
    with refusal(BadSettingError, "negative_"):
        TextRequest(negative_prompt=prompt).flags()


@pytest.mark.parametrize("prompt", ["[(red:1.2)] a", r"\[a|b\]", "a band: [red]", "a (b:1.1)|c"])
def test_prompts_that_only_look_so(prompt: str) -> None:
    assert TextRequest(prompt=prompt).flags()["prompt"] == [prompt]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"steps": 0}, "steps"),
        ({"cfg_scale": "wide"}, "cfg_scale"),
        ({"seed": -2}, "seed"),
        ({"override_settings": {"sd_lora": "x"}}, "override_settings.sd_lora"),
        ({"override_settings": {"sd_vae": "other.pt"}}, "override_settings.sd_vae"),
        ({"override_settings": {"CLIP_stop_at_last_layers": 0}}, "CLIP_stop_at_last_layers"),
    ],
    ids=str,
)
def test_wrong_values(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        TextRequest.model_validate(asked)
    assert said in ".".join(map(str, caught.value.errors()[0]["loc"]))


def masked(mask: np.ndarray = MASK, **more: Any) -> PictureRequest:
    images = [Image.fromarray(PICTURE)]
    own = {"mask_blur": 0, "inpainting_fill": 1, "prompt": "a"}
    asked = sent("img2img", images=images, mask_image=Image.fromarray(mask), **own | more)
    return PictureRequest.model_validate(asked)


def given(asked: PictureRequest) -> tuple[np.ndarray, np.ndarray]:
    """The picture and the mask that a run begins with."""
    found = asked.pictures(MOST)
    image = read_picture(io.BytesIO(found["image"]), "#ffffff")
    return image, read_picture(io.BytesIO(found["mask_image"]), "#000000")[..., 0]


def test_masks() -> None:
    image, mask = given(masked())
    assert np.array_equal(image, PICTURE) and np.array_equal(mask, MASK)
    assert np.array_equal(given(masked(inpainting_mask_invert=1))[1], 255 - MASK)
    grey = given(masked(MASK // 2 + 10))[1]  # 137 and 10
    assert np.array_equal(grey, MASK)
    blurred = given(masked(mask_blur=2))[1]
    assert blurred[16, 24] == 255 and 64 < blurred[8, 24] < 192 and blurred[0, 0] == 0
    filled = given(masked(inpainting_fill=0))[0]
    assert np.array_equal(filled[MASK == 0], PICTURE[MASK == 0])
    assert filled[16, 16:32].std() < PICTURE[16, 16:32].std() / 2


def test_where_masks_work() -> None:
    flags = masked(inpaint_full_res_padding=8, resize_mode=1).flags()
    assert flags["keep_unmasked"] and flags["padding_mask_crop"] == 8
    assert "resize_mode" not in flags  # the crop fills the size
    whole = masked(inpaint_full_res=False, resize_mode=1).flags()
    assert whole["keep_unmasked"] and whole["padding_mask_crop"] is None
    assert whole["resize_mode"] == "crop"
    assert masked(inpaint_full_res=False, resize_mode=2).flags()["resize_mode"] == "fill"
    with refusal(BadSettingError, "resize_mode 3 is not supported"):
        masked(resize_mode=3).flags()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"inpainting_fill": 2}, "inpainting_fill 2 is not supported here: give 0"),
        ({"mask": np.zeros((32, 48), np.uint8)}, "mask masks nothing"),
        ({"mask": MASK[:16]}, "mask is 48×16, its picture 48×32"),
    ],
    ids=["fill", "black", "size"],
)
def test_masks_of_no_use(more: dict[str, Any], said: str) -> None:
    with refusal(BadSettingError, said):
        masked(**more).pictures(MOST)


def test_pictures_of_no_use() -> None:
    one = encoded(PICTURE)
    with refusal(BadSettingError, "init_images has 2 pictures: give one"):
        PictureRequest(init_images=[one, one]).pictures(MOST)
    with refusal(BadSettingError, "init_images has 48×32 pixels, more than the 100"):
        PictureRequest(init_images=[one], mask=one).pictures(100)
    for address in ("http://127.0.0.1/a.png", "file:///etc/passwd", "../a.png"):
        with refusal(BadSettingError, "the server opens no addresses"):
            PictureRequest(init_images=[address]).pictures(MOST)
    assert decoded(one, "image") == decoded(one.partition(",")[2], "image")
    assert base64.b64encode(decoded(one, "image")).decode() == one.partition(",")[2]
    assert PictureRequest(init_images=[one], mask="").pictures(MOST).keys() == {"image"}


def test_what_an_answer_repeats() -> None:
    told = masked(include_init_images=False).told()
    assert told["init_images"] is None and told["mask"] is None and told["steps"] == 20
    assert masked(include_init_images=True).told()["init_images"]
    assert "hr_scale" not in TextRequest.model_validate({"hr_scale": float("nan")}).told()


def test_loras_are_called_in_a_prompt() -> None:
    asked = TextRequest(prompt="a <lora:fine:0.5>star<lora:old one:-.2>, <lora:fine:1> <lora:x>")
    assert asked.loras() == {"fine": 1.5, "old one": -0.2, "x": 1.0}
    assert asked.flags()["prompt"] == ["a star,  "]
    assert TextRequest(prompt="a star").loras() == {}
