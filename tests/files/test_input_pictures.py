"""Whatever a picture's file holds, the same sRGB pixels come of it; what cannot be is refused."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from common.errors import BadInputFileError
from common.files import input_pictures
from common.files.input_pictures import (
    hash_picture,
    picture_size,
    pictures_in,
    read_alpha,
    read_mask,
    read_picture,
)
from tests.refusals import refusal

WHITE = "#ffffff"
PIXELS = np.random.default_rng(7).integers(0, 256, (6, 4, 3), np.uint8)


def saved(path: Path, image: Image.Image, **options: Any) -> str:
    image.save(path, **options)
    return str(path)


@pytest.mark.parametrize(("name", "options"), [("a.png", {}), ("a.webp", {"lossless": True})])
def test_rgb_stays_as_it_is(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    place = saved(tmp_path / name, Image.fromarray(PIXELS), **options)
    np.testing.assert_array_equal(read_picture(place, WHITE), PIXELS)
    assert picture_size(place, "image") == (6, 4)


def test_the_name_says_nothing(tmp_path: Path) -> None:
    place = saved(tmp_path / "a.jpg", Image.fromarray(PIXELS), format="PNG")
    np.testing.assert_array_equal(read_picture(place, WHITE), PIXELS)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_a_turned_picture(tmp_path: Path, name: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[input_pictures.ORIENTATION] = orientation
    options: dict[str, Any] = {"lossless": True} if name == "a.webp" else {}
    place = saved(tmp_path / name, Image.fromarray(PIXELS), exif=exif, **options)
    with Image.open(place) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(read_picture(place, WHITE), expected)
    assert picture_size(place, "image") == expected.shape[:2]


def test_alpha_lies_over_the_background(tmp_path: Path) -> None:
    """Not the colours that are hidden under it."""
    alpha = np.full((6, 4, 1), 255, np.uint8)
    alpha[0], alpha[1] = 0, 128
    place = saved(tmp_path / "a.png", Image.fromarray(np.concatenate([PIXELS, alpha], 2)))
    found = read_picture(place, "#0040ff")
    over = np.array([0, 64, 255])
    np.testing.assert_array_equal(found[0], np.broadcast_to(over, (4, 3)))
    half = (PIXELS[1] * 128.0 + over * 127.0) / 255
    assert np.abs(found[1] - half).max() <= 1
    np.testing.assert_array_equal(found[2:], PIXELS[2:])


def test_grey_with_alpha_and_a_transparent_colour(tmp_path: Path) -> None:
    grey = np.array([[[10, 255], [20, 0]]], np.uint8)
    place = saved(tmp_path / "la.png", Image.fromarray(grey, "LA"))
    assert read_picture(place, "#ff0000").tolist() == [[[10] * 3, [255, 0, 0]]]
    image = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    place = saved(tmp_path / "key.png", image, transparency=(4, 5, 6))
    assert read_picture(place, WHITE).tolist() == [[[1, 2, 3], [255, 255, 255]]]


def test_palettes(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    image.putpalette([9, 8, 7, 200, 100, 50])
    assert read_picture(saved(tmp_path / "p.png", image), WHITE).tolist() == [
        [[9, 8, 7], [200, 100, 50]]
    ]
    place = saved(tmp_path / "t.png", image, transparency=1)
    assert read_picture(place, WHITE).tolist() == [[[9, 8, 7], [255, 255, 255]]]
    one_bit = saved(tmp_path / "1.png", Image.fromarray(np.array([[True, False]])))
    assert read_picture(one_bit, WHITE).tolist() == [[[255] * 3, [0] * 3]]


def test_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    """Pillow's own conversion gives 255 for all of the last three."""
    grey = np.array([[0, 257, 32768, 65535]], np.uint16)
    place = saved(tmp_path / "a.png", Image.fromarray(grey))
    assert read_picture(place, WHITE)[0, :, 0].tolist() == [0, 1, 128, 255]
    assert read_mask(place)[0].tolist() == [0, 1, 128, 255]


def test_cmyk(tmp_path: Path) -> None:
    inks = np.zeros((16, 16, 4), np.uint8)
    inks[..., 0], inks[..., 3] = 255, 51
    place = saved(tmp_path / "a.jpg", Image.fromarray(inks, "CMYK"), quality=100)
    found = read_picture(place, WHITE)
    assert np.abs(found.astype(int) - [0, 204, 204]).max() <= 2


def profile_of(gamma: float) -> bytes:
    """A profile with sRGB's colours and another curve, by the bytes of its `curv` tags."""
    made = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    content = bytearray(made)
    count = int.from_bytes(content[128:132], "big")
    for number in range(count):
        entry = content[132 + 12 * number : 144 + 12 * number]
        name, at = bytes(entry[:4]), int.from_bytes(entry[4:8], "big")
        if name == b"desc":
            size = int.from_bytes(entry[8:12], "big")
            text = content[at : at + size].replace(b"s\0R\0G\0B", b"o\0w\0n\0x")
            content[at : at + size] = text.replace(b"sRGB", b"ownx")
        if name in (b"rTRC", b"gTRC", b"bTRC"):
            fixed = round(gamma * 65536).to_bytes(4, "big")
            content[at : at + 16] = b"para\0\0\0\0\0\0\0\0" + fixed
    return bytes(content)


def test_a_colour_profile_is_converted(tmp_path: Path) -> None:
    """A linear profile's 55 is sRGB's 127 or so."""
    image = Image.fromarray(np.full((4, 4, 3), 55, np.uint8))
    place = saved(tmp_path / "a.png", image, icc_profile=profile_of(1.0))
    linear = 55 / 255
    expected = 255 * (1.055 * linear ** (1 / 2.4) - 0.055)
    assert np.abs(read_picture(place, WHITE).astype(float) - expected).max() <= 1.5
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    place = saved(tmp_path / "b.png", Image.fromarray(PIXELS), icc_profile=srgb)
    np.testing.assert_array_equal(read_picture(place, WHITE), PIXELS)


def test_a_profile_that_does_not_fit_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = saved(tmp_path / "a.png", Image.fromarray(PIXELS), icc_profile=b"no profile")
    np.testing.assert_array_equal(read_picture(place, WHITE), PIXELS)
    assert "its colour profile cannot be used" in capsys.readouterr().err


def test_a_transparent_mask_masks_nothing(tmp_path: Path) -> None:
    pixels = np.full((1, 2, 4), 255, np.uint8)
    pixels[0, 1, 3] = 0
    place = saved(tmp_path / "a.png", Image.fromarray(pixels))
    assert read_mask(place).tolist() == [[255, 0]]


def test_pixels_and_shape_make_the_hash() -> None:
    assert hash_picture(PIXELS) == hash_picture(PIXELS.copy())
    assert hash_picture(PIXELS) != hash_picture(PIXELS.reshape(4, 6, 3))


def test_a_folder_is_its_pictures_by_name(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpg", "notes.txt", "c.webp"):
        (tmp_path / name).touch()
    found = [Path(each).name for each in pictures_in(str(tmp_path), "image")]
    assert found == ["a.jpg", "b.PNG", "c.webp"]
    (tmp_path / "empty").mkdir()
    with refusal(BadInputFileError, "--image", "holds no picture", ".webp"):
        pictures_in(str(tmp_path / "empty"), "image")
    with refusal(BadInputFileError, "--mask_image nowhere is not there"):
        pictures_in("nowhere", "mask_image")


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def animated(path: Path) -> bytes:
    first, second = Image.fromarray(PIXELS), Image.fromarray(PIXELS[::-1].copy())
    first.save(path, format="WEBP", save_all=True, append_images=[second])
    return path.read_bytes()


def bomb(_: Path) -> bytes:
    """A PNG's header of a picture that would take twelve GB."""
    whole = bytearray(png(PIXELS))
    whole[16:24] = (65_000).to_bytes(4, "big") * 2
    import zlib

    whole[29:33] = zlib.crc32(whole[12:29]).to_bytes(4, "big")
    return bytes(whole)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda _: b"", "no PNG, JPEG or WebP"),
        (lambda _: b"GIF89a" + bytes(20), "no PNG, JPEG or WebP"),
        (lambda _: b"<html>404</html>", "no PNG, JPEG or WebP"),
        (lambda _: png(PIXELS)[:50], "damaged"),
        (animated, "animated"),
        (bomb, "million are read"),
    ],
)
def test_what_is_no_picture(tmp_path: Path, make: Callable[[Path], bytes], words: str) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(make(tmp_path / "made"))
    with refusal(BadInputFileError, f"--image {path}", words):
        read_picture(str(path), WHITE)


def test_a_large_picture_is_refused_by_its_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = saved(tmp_path / "a.png", Image.fromarray(PIXELS))
    monkeypatch.setattr(input_pictures, "MOST_INPUT_PIXELS", PIXELS[..., 0].size - 1)
    monkeypatch.setattr(Image.Image, "load", None)  # nothing is decoded
    with refusal(BadInputFileError, "4×6 pixels", "shrink it"):
        picture_size(place, "image")
    with refusal(BadInputFileError, "4×6 pixels"):
        read_picture(place, WHITE)


def test_the_alpha_of_a_picture_as_it_is_shown(tmp_path: Path) -> None:
    """Turned as EXIF says; of palettes and of a colour that stands for transparent as well."""
    alpha = np.arange(24, dtype=np.uint8).reshape(6, 4)
    exif = Image.Exif()
    exif[input_pictures.ORIENTATION] = 6
    image = Image.fromarray(np.dstack([PIXELS, alpha]))
    place = saved(tmp_path / "a.png", image, exif=exif)
    found = read_alpha(place, "mask")
    assert found is not None and np.array_equal(found, np.rot90(alpha, -1))
    in_memory = io.BytesIO(Path(place).read_bytes())
    assert np.array_equal(read_picture(in_memory, WHITE), read_picture(place, WHITE))
    grey = Image.fromarray(alpha)
    one_colour = read_alpha(saved(tmp_path / "b.png", grey, transparency=5), "mask")
    assert one_colour is not None and np.array_equal(one_colour == 0, alpha == 5)
    assert read_alpha(saved(tmp_path / "c.png", Image.fromarray(PIXELS)), "mask") is None
    with refusal(BadInputFileError, "mask is no PNG"):
        read_alpha(io.BytesIO(b"no"), "mask")
