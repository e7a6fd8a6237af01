"""Settings of pictures that a run begins with, as flags and files give them."""

import pytest

from common.declared import validate
from common.errors import BadSettingError
from common.vae.input_settings import InputSettings
from tests.refusals import refusal


def test_a_flag_lists_the_borders() -> None:
    assert InputSettings(outpaint="8,0,16,0").outpaint == (8, 0, 16, 0)  # type: ignore[arg-type]
    assert InputSettings(image_background="#FFAA00").image_background == "#ffaa00"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"outpaint": "8,0,16"}, "four numbers of pixels"),
        ({"outpaint": "0,0,0,0"}, "adds nothing"),
        ({"outpaint": "-8,0,0,0"}, "greater than or equal to 0"),
        ({"outpaint": "8,0,0,0", "padding_mask_crop": 4}, "leave it or outpaint out"),
        ({"padding_mask_crop": -1}, "greater than or equal to 0"),
        ({"padding_mask_crop": 4, "resize_mode": "crop"}, "fills"),
        ({"image_background": "white"}, "#rrggbb"),
        ({"resize_mode": "stretch"}, "'default', 'fill' or 'crop'"),
    ],
    ids=str,
)
def test_what_is_no_setting(values: dict[str, object], words: str) -> None:
    with refusal(BadSettingError, words):
        validate(InputSettings, values, "flags")
