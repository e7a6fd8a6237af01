"""Pictures that come with requests: read within bounds, and turned into what a run takes."""

import base64
import binascii
import io
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np
from PIL import Image, ImageFilter

from common.errors import BadInputFileError, BadSettingError
from common.files.input_pictures import (
    WHITE_FROM,
    picture_size,
    read_alpha,
    read_mask,
    read_picture,
)

WHITE = "#ffffff"  # under what is transparent


def decoded(text: str, field: str) -> bytes:
    """The bytes of base64, alone or in a data URL.

    Raises:
        BadSettingError: it is neither.
    """
    head, comma, body = text.partition(",")
    is_one = not comma or (head.startswith("data:") and head.endswith(";base64"))
    with suppress(binascii.Error, ValueError):
        if is_one:
            return base64.b64decode(body if comma else text, validate=True)
    raise BadSettingError(
        f"{field}: give pictures as base64 or as data URLs; the server opens no addresses"
    )


def check_picture(data: bytes, field: str, most_pixels: int) -> tuple[int, int]:
    """An encoded picture's height and width; only its header is read.

    Args:
        field: of the request, for messages.

    Raises:
        BadSettingError: it is no picture, or has more pixels than may be.
    """
    with _in_a_request():
        height, width = picture_size(io.BytesIO(data), field)
    if height * width > most_pixels:
        raise BadSettingError(
            f"{field} has {width}×{height} pixels, more than the {most_pixels} that are allowed: "
            "shrink it"
        )
    return height, width


def pixels_of(data: bytes, field: str, most_pixels: int) -> np.ndarray:
    """A picture as [H, W, 3] uint8 in sRGB, over white. Raises as `check_picture`."""
    check_picture(data, field, most_pixels)
    with _in_a_request():
        return read_picture(io.BytesIO(data), WHITE, field)


def to_edit(image: bytes, mask: bytes | None, most_pixels: int) -> dict[str, bytes]:
    """What a run begins with, where what is transparent is to be made anew.

    Args:
        mask: whose transparency says so; None: the picture's own, if it has some.

    Returns:
        image, and mask_image where something stays.

    Raises:
        BadSettingError: as `check_picture`, or the mask says nothing.
    """
    size = check_picture(image, "image", most_pixels)
    source, field = (image, "image") if mask is None else (mask, "mask")
    own_size = check_picture(source, field, most_pixels)
    with _in_a_request():
        alpha = read_alpha(io.BytesIO(source), field)
    if alpha is None or not (alpha < WHITE_FROM).any():
        if mask is None:
            return {"image": image}
        raise BadSettingError(
            "mask has no transparent part: give a PNG that is transparent where the picture is to "
            "be edited"
        )
    _refuse_other_size(own_size, size)
    return {"image": image, "mask_image": encode(255 - alpha)}


def mask_in(data: bytes, most_pixels: int) -> np.ndarray:
    """A mask as web UIs read it, [H, W] uint8: its alpha where it has some, else how white it is.

    Raises as `check_picture`.
    """
    check_picture(data, "mask", most_pixels)
    with _in_a_request():
        alpha = read_alpha(io.BytesIO(data), "mask")
        if alpha is not None and (alpha < 255).any():
            return alpha
        return read_mask(io.BytesIO(data))


def check_mask(mask: np.ndarray, size: tuple[int, int]) -> None:
    """Raise `BadSettingError` for a mask of another size than its picture's, or that is black."""
    _refuse_other_size(mask.shape[:2], size)
    if not (mask >= WHITE_FROM).any():
        raise BadSettingError("mask masks nothing: paint white what is to be made anew")


def blurred(mask: np.ndarray, radii: tuple[int, int]) -> np.ndarray:
    """A mask [H, W] uint8 after a Gaussian filter with these standard deviations, x and y."""
    if radii == (0, 0):
        return mask
    return np.asarray(Image.fromarray(mask).filter(ImageFilter.GaussianBlur(radii)))


def filled(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A picture [H, W, 3] whose masked part has the colours of what surrounds it, both uint8.

    By pull-push (Gortler et al. 1996, "The Lumigraph"): means of ever larger squares of what is
    known, brought back from the largest to the smallest.
    """
    known = 1 - mask.astype(np.float32) / 255
    return _pull_push(picture.astype(np.float32), known).round().clip(0, 255).astype(np.uint8)


def encode(pixels: np.ndarray) -> bytes:
    """A PNG of [H, W, 3] or [H, W] uint8."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _pull_push(colours: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Colours [H, W, 3] with those filled in that are not known [H, W], float32."""
    height, width = known.shape
    if known.min() == 1 or (height, width) == (1, 1):
        return colours
    half = ((width + 1) // 2, (height + 1) // 2)
    weight = _resized(known, half, Image.Resampling.BOX)
    weighted = [
        _resized(colours[..., channel] * known, half, Image.Resampling.BOX) for channel in range(3)
    ]
    coarse = np.stack(weighted, -1) / np.maximum(weight, 1e-6)[..., None]
    coarse = _pull_push(coarse, np.minimum(1, 4 * weight))
    back = [
        _resized(coarse[..., channel], (width, height), Image.Resampling.BILINEAR)
        for channel in range(3)
    ]
    return known[..., None] * colours + (1 - known[..., None]) * np.stack(back, -1)


def _resized(values: np.ndarray, size: tuple[int, int], how: Image.Resampling) -> np.ndarray:
    return np.asarray(Image.fromarray(values).resize(size, how))


def _refuse_other_size(size: tuple[int, ...], of_picture: tuple[int, int]) -> None:
    if size != of_picture:
        (height, width), (own_height, own_width) = of_picture, size
        raise BadSettingError(
            f"mask is {own_width}×{own_height}, its picture {width}×{height}: give a mask of the "
            "picture's size"
        )


@contextmanager
def _in_a_request() -> Iterator[None]:
    """What is wrong with a picture is a wrong value of the request's, no file of ours."""
    try:
        yield
    except BadInputFileError as error:
        raise BadSettingError(str(error)) from None
