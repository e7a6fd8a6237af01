"""What is declared of decoding, and what its values may be."""

from typing import Any, get_args

import pytest

from common.declared import IMAGE_LATENTS, PICTURES, declarations, validate
from common.errors import BadSettingError
from common.files.picture_files import ImageFormat
from common.vae.vae_settings import VaeSettings


def test_its_settings_shape_what_a_vae_makes() -> None:
    found = dict(declarations(VaeSettings))
    of_files = {"image_format", "name_template", "index", "grid_images"}
    assert found.keys() == {"vae_dtype", "tile", *of_files}
    both = (IMAGE_LATENTS, PICTURES)
    assert found["vae_dtype"].makes == found["tile"].makes == both
    assert all(found[name].makes == (PICTURES,) for name in of_files)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"vae_dtype": "float16"}, "--vae_dtype 'float16'"),
        ({"tile": "perhaps"}, "--tile 'perhaps'"),
        ({"image_format": "gif"}, "--image_format 'gif'"),
        ({"grid_images": -1}, "--grid_images -1"),
        ({"index": "xlsx"}, "--index 'xlsx'"),
        ({"tiles": True}, "did you mean 'tile'"),
    ],
)
def test_a_bad_value_is_named(values: dict[str, Any], words: str) -> None:
    with pytest.raises(BadSettingError, match=words):
        validate(VaeSettings, values, "flags")


def test_every_format_of_pictures_can_be_asked_for() -> None:
    for name in get_args(ImageFormat):
        assert VaeSettings(image_format=name).image_format == name
