"""What comes with requests, turned into what a run begins with."""

import io

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from common.errors import BadSettingError
from common.files.input_pictures import read_mask
from common.serving.request_pictures import (
    blurred,
    check_mask,
    check_picture,
    encode,
    filled,
    mask_in,
    pixels_of,
    to_edit,
)
from tests.refusals import refusal

MOST = 10_000
PIXELS = np.random.default_rng(3).integers(0, 256, (24, 40, 3), np.uint8)


def png(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def with_alpha(alpha: np.ndarray) -> bytes:
    return png(Image.fromarray(np.dstack([PIXELS, alpha]).astype(np.uint8)))


LEFT = np.where(np.arange(40) < 16, 0, 255)[None].repeat(24, 0)  # its left part is transparent


def test_pictures_are_read_within_bounds() -> None:
    assert check_picture(encode(PIXELS), "image", 960) == (24, 40)
    assert np.array_equal(pixels_of(encode(PIXELS), "image", 960), PIXELS)
    with refusal(BadSettingError, "image has 40×24 pixels, more than the 959"):
        check_picture(encode(PIXELS), "image", 959)
    with refusal(BadSettingError, "mask is no PNG, JPEG or WebP"):
        mask_in(b"GIF89a", MOST)
    with refusal(BadSettingError, "image is damaged"):
        pixels_of(encode(PIXELS)[:200], "image", MOST)


@pytest.mark.parametrize("whose", ["mask", "image", "palette"])
def test_what_is_transparent_is_made_anew(whose: str) -> None:
    """As diffusers has it, white in a mask."""
    plain, transparent = encode(PIXELS), with_alpha(LEFT)
    if whose == "palette":
        image = Image.fromarray((LEFT > 0).astype(np.uint8), "P")
        image.putpalette([0, 0, 0, 255, 0, 0])
        transparent = png(image, transparency=0)
    found = to_edit(*((transparent, None) if whose == "image" else (plain, transparent)), MOST)
    assert found["image"] == (transparent if whose == "image" else plain)
    mask = read_mask(io.BytesIO(found["mask_image"]))
    assert np.array_equal(mask, np.where(LEFT == 0, 255, 0))


def test_edits_without_transparency_begin_with_the_picture_alone() -> None:
    for image in (encode(PIXELS), with_alpha(np.full((24, 40), 255)), with_alpha(LEFT // 2 + 128)):
        assert to_edit(image, None, MOST) == {"image": image}


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (encode(PIXELS), "mask has no transparent part"),
        (with_alpha(np.full((24, 40), 255)), "mask has no transparent part"),
        (png(Image.new("RGBA", (40, 23))), "mask is 40×23, its picture 40×24"),
        (b"", "mask is no PNG"),
    ],
    ids=["no_alpha", "opaque", "size", "empty"],
)
def test_masks_of_edits_that_say_nothing(mask: bytes, said: str) -> None:
    with refusal(BadSettingError, said):
        to_edit(encode(PIXELS), mask, MOST)


def test_masks_of_web_uis() -> None:
    grey = np.arange(960, dtype=np.uint8).reshape(24, 40)
    assert np.array_equal(mask_in(encode(grey), MOST), grey)
    assert np.array_equal(mask_in(with_alpha(LEFT), MOST), LEFT)  # the colours count for nothing
    opaque = with_alpha(np.full((24, 40), 255))
    luma = np.asarray(Image.fromarray(PIXELS).convert("L"))
    assert np.array_equal(mask_in(opaque, MOST), luma)
    check_mask(grey, (24, 40))
    with refusal(BadSettingError, "mask is 40×24, its picture 24×40"):
        check_mask(grey, (40, 24))
    with refusal(BadSettingError, "mask masks nothing"):
        check_mask(np.full((24, 40), 127, np.uint8), (24, 40))


def test_blurred_as_by_scipy() -> None:
    mask = np.zeros((64, 64), np.uint8)
    mask[20:40, 16:48] = 255
    assert blurred(mask, (0, 0)) is mask
    expected = ndimage.gaussian_filter(mask.astype(float), (2, 5), mode="nearest")
    difference = np.abs(blurred(mask, (5, 2)).astype(float) - expected)
    assert difference.max() < 8  # three box filters stand for it, in whole numbers


def test_what_is_masked_takes_the_colours_around_it() -> None:
    picture = np.zeros((40, 64, 3), np.uint8)
    picture[:, :32], picture[:, 32:] = (200, 10, 10), (10, 10, 200)
    mask = np.zeros((40, 64), np.uint8)
    mask[8:32, 4:60] = 255
    picture[mask > 0] = (0, 255, 0)  # which is not to be seen
    found = filled(picture, mask)
    assert np.array_equal(found[mask == 0], picture[mask == 0])
    inside = found[8:32, 4:60].astype(int)
    assert inside[..., 1].max() <= 11 and inside[:, 0, 0].min() > 150 > inside[:, -1, 0].max()
    half = np.full((40, 64), 128, np.uint8)
    assert np.abs(filled(picture, half).astype(int) - picture).mean() < 64
    assert filled(picture, np.full((40, 64), 255, np.uint8)).max() == 0  # nothing is known


def test_a_mask_that_is_empty_changes_nothing() -> None:
    assert np.array_equal(filled(PIXELS, np.zeros((24, 40), np.uint8)), PIXELS)
