"""Pictures that people give: read into 8-bit sRGB, whatever the file holds.

Turned as EXIF says, alpha composited over a colour, 16 bits scaled to 8, palettes and CMYK
resolved, colour profiles converted. Pillow alone shows what lies under transparent pixels, and
cuts 16 bits off at 255.
"""

import hashlib
import io
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from common.errors import BadInputFileError, in_one_line
from common.messages import warn

FORMATS = ("PNG", "JPEG", "WEBP")
ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
WHITE_FROM = 128  # of 255, diffusers' 0.5: what of a mask is made anew
MOST_INPUT_PIXELS = 100_000_000  # of a picture: some GB while it is converted
ORIENTATION = 0x0112  # EXIF's tag; values from 5 on turn a picture by a quarter
# What Pillow raises for files that are damaged, or made to do harm.
UNREADABLE = (
    *(OSError, ValueError, SyntaxError, EOFError, MemoryError, TypeError, KeyError, struct.error),
    Image.DecompressionBombError,
)
_QUARTER_TURNS = range(5, 9)
Source = str | io.BytesIO  # a picture's file, or its content


def pictures_in(place: str, flag: str) -> list[str]:
    """The pictures that a path names: itself, or those of a folder, sorted by their names.

    Raises:
        BadInputFileError: there is none.
    """
    path = Path(place)
    if not path.exists():
        raise BadInputFileError(f"--{flag} {place} is not there: name a picture, or a folder")
    if not path.is_dir():
        return [place]
    found = sorted(str(file) for file in path.iterdir() if file.suffix.lower() in ENDINGS)
    if not found:
        raise BadInputFileError(
            f"--{flag} {place} holds no picture: give a folder with {', '.join(ENDINGS)} files"
        )
    return found


def picture_size(place: Source, flag: str) -> tuple[int, int]:
    """A picture's height and width in pixels, as it is shown; only its header is read.

    Raises:
        BadInputFileError: as `read_picture`.
    """
    with _opened(place, flag) as image:
        turned = image.getexif().get(ORIENTATION) in _QUARTER_TURNS
        return (image.width, image.height) if turned else (image.height, image.width)


def read_picture(place: Source, background: str, flag: str = "image") -> np.ndarray:
    """A picture as [H, W, 3] uint8 in sRGB.

    Args:
        background: the colour that shows where the picture is transparent, as "#ffffff".
        flag: that names the picture, for messages.

    Raises:
        BadInputFileError: it is no PNG, JPEG or WebP, is damaged, animated or too large.
    """
    with _opened(place, flag) as image:
        image.load()
        profile = image.info.get("icc_profile")
        turned = _in_8_bits(ImageOps.exif_transpose(image))
    alpha = _alpha_in(turned)
    if alpha is not None:
        turned = turned.convert("RGBA").convert("RGB")
    picture = _in_srgb(turned, profile, _said(place, flag))
    if alpha is not None:
        below = Image.new("RGB", picture.size, background)
        picture = Image.composite(picture, below, alpha)
    return np.asarray(picture)


def read_alpha(place: Source, flag: str) -> np.ndarray | None:
    """How opaque a picture is, [H, W] uint8 with 255 for wholly; None: it has no transparency.

    Raises:
        BadInputFileError: as `read_picture`.
    """
    with _opened(place, flag) as image:
        image.load()
        alpha = _alpha_in(ImageOps.exif_transpose(image))
    return None if alpha is None else np.asarray(alpha)


def read_mask(place: Source) -> np.ndarray:
    """A mask as [H, W] uint8: what is white is made anew, what is transparent stays.

    Raises:
        BadInputFileError: as `read_picture`.
    """
    picture = read_picture(place, "#000000", "mask_image")
    return np.asarray(Image.fromarray(picture).convert("L"))


def hash_picture(pixels: np.ndarray) -> str:
    """sha256 of a picture's shape and bytes."""
    digest = hashlib.sha256(str(pixels.shape).encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()


def with_borders(picture: np.ndarray, borders: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """A picture [H, W, 3] with borders to paint, and their mask [H, W], both uint8.

    What is painted over begins as the picture's edge, drawn out.

    Args:
        borders: pixels to the left, top, right and bottom.
    """
    left, top, right, bottom = borders
    around = ((top, bottom), (left, right))
    wide = np.pad(picture, (*around, (0, 0)), mode="edge")
    return wide, np.pad(np.zeros(picture.shape[:2], np.uint8), around, constant_values=255)


@contextmanager
def _opened(place: Source, flag: str) -> Iterator[Image.Image]:
    """A picture that is not read yet; what is wrong with it is said in one sentence."""
    said = _said(place, flag)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow's own bound, which is another one
            image = Image.open(place, formats=FORMATS)
        with image:
            if image.width * image.height > MOST_INPUT_PIXELS:
                raise _too_large(said, f"{image.width}×{image.height} pixels")
            # A JPEG of a phone holds smaller ones beside it (MPO).
            if image.format not in ("JPEG", "MPO") and getattr(image, "n_frames", 1) > 1:
                raise BadInputFileError(f"{said} is animated: give one picture of it")
            yield image
    except Image.DecompressionBombError:
        raise _too_large(said, "a great many pixels") from None
    except FileNotFoundError:
        raise BadInputFileError(f"{said} is not there: name a picture") from None
    except UnidentifiedImageError:
        raise BadInputFileError(
            f"{said} is no PNG, JPEG or WebP, whatever its name: give one of these"
        ) from None
    except UNREADABLE as error:
        reason = in_one_line(error) or "it ends early"
        raise BadInputFileError(
            f"{said} is damaged ({reason}): give a picture that opens"
        ) from None


def _said(place: Source, flag: str) -> str:
    """What a picture is called in messages."""
    return f"--{flag} {place}" if isinstance(place, str) else flag


def _alpha_in(image: Image.Image) -> Image.Image | None:
    """The alpha of a picture that has some, be it that of a palette or of one colour."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        return image.convert("RGBA").getchannel("A")
    return None


def _too_large(said: str, size: str) -> BadInputFileError:
    return BadInputFileError(
        f"{said} has {size}; at most {MOST_INPUT_PIXELS // 1_000_000} million are read: shrink it"
    )


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits scaled; Pillow's own conversion cuts it off at 255."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image).astype(np.float64) / 257
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))


def _in_srgb(image: Image.Image, profile: bytes | None, said: str) -> Image.Image:
    """A picture without alpha in sRGB's RGB, by its colour profile where it has one."""
    if image.mode in ("P", "1"):
        image = image.convert("RGB")
    if profile:
        try:
            own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if "srgb" in ImageCms.getProfileDescription(own).lower():
                return image.convert("RGB")
            srgb = ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(image, own, srgb, outputMode="RGB")
            assert converted is not None
            return converted
        except (ImageCms.PyCMSError, OSError, ValueError):
            warn(f"{said}: its colour profile cannot be used, its colours are taken for sRGB")
    return image.convert("RGB")
