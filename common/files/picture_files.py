"""Save pictures with their settings inside, and read those settings back."""

import hashlib
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin

from common.declared import PICTURES
from common.errors import shorten
from common.files.artifacts import HEADER_KEY
from common.files.recipe import FORMAT_VERSION, refuse_other_format
from common.files.stage_table import maker_of

ImageFormat = Literal["png", "webp", "jpg"]
FORMATS: tuple[str, ...] = get_args(ImageFormat)
MOST_WEBP_PIXELS = 16_383  # a side, by its container specification

# Grids of many pictures are larger than Pillow lets pass; this is some 2 GB decoded.
Image.MAX_IMAGE_PIXELS = 350_000_000

USER_COMMENT, MAKER_NOTE = int(ExifTags.Base.UserComment), int(ExifTags.Base.MakerNote)
EXIF_FOLDER = int(ExifTags.IFD.Exif)
# The EXIF standard's mark of a user comment in UTF-16.
UNICODE_MARK = b"UNICODE\0"
# A JPEG's segment holds 65,533 bytes, its mark included (ITU T.81, B.1.1.4; EXIF's mark has six).
MOST_JPEG_EXIF = 65_533 - 6
# Characters that a text, and a twentieth of it items that a list keeps: the first that fit.
_KEPT_OF_TEXTS = (8_000, 4_000, 2_000, 1_000, 400, 100, 40)
LOSSY_QUALITY = 95

OUR_NAME = re.compile(r"output_(image(_\d{4,})?|grid(_\d{4,})?|trajectory)\.(png|webp|jpg)")
TRAJECTORY_STRIP, TRAJECTORY_ANIMATION = "output_trajectory.png", "output_trajectory.webp"
FRAME_MILLISECONDS, LAST_FRAME_MILLISECONDS = 200, 1500

WEB_UI_ORDER = ("Steps", "Sampler", "CFG scale", "Seed", "Size", "Model")  # others follow


def grid_names(count: int, grid_images: int, image_format: ImageFormat) -> list[str]:
    """Names of the grids of so many pictures; a single picture has none, a single grid no number.

    Args:
        grid_images: that a whole grid has; 0: there are none.
    """
    if count == 1 or grid_images == 0:
        return []
    return numbered("output_grid", -(-count // grid_images), image_format)


def numbered(name: str, count: int, image_format: ImageFormat) -> list[str]:
    """Names of files of one kind; a single one has no number."""
    if count == 1:
        return [f"{name}.{image_format}"]
    digits = max(4, len(str(count - 1)))  # so that names sort as the pictures do
    return [f"{name}_{index:0{digits}d}.{image_format}" for index in range(count)]


def find_pictures(folder: Path) -> list[Path]:
    """The pictures in a folder that may not be there, in the order of their names."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix.removeprefix(".") in FORMATS)


def read_pixels(path: Path) -> np.ndarray:
    """A picture as [H, W, 3] uint8; an animation's first frame."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def picture_shape(path: Path) -> tuple[int, int, int]:
    """[H, W, 3] of a picture's pixels."""
    with Image.open(path) as image:
        return image.height, image.width, 3


def hash_pixels(pixels: np.ndarray) -> str:
    """sha256 of a picture's bytes, [H, W, 3] uint8."""
    return hashlib.sha256(np.ascontiguousarray(pixels).data).hexdigest()


def encode_picture(
    pixels: np.ndarray, suffix: str, record: dict[str, Any], parameters: str
) -> bytes:
    """The file of a picture [H, W, 3] uint8, with `record` as JSON in its metadata.

    PNG: a text chunk, and another one for web UIs. WebP (lossless) and JPEG: the EXIF maker note,
    and the user comment for web UIs.

    Args:
        suffix: .png, .webp or .jpg.
        record: a JPEG's as `fit_record` gives it.
        parameters: the text for web UIs, as `web_ui_parameters` gives it.
    """
    image, file = Image.fromarray(pixels), io.BytesIO()
    if suffix == ".png":
        chunks = PngImagePlugin.PngInfo()
        chunks.add_itxt(HEADER_KEY, _to_text(record))
        chunks.add_itxt("parameters", parameters)
        image.save(file, format="PNG", pnginfo=chunks)
    elif suffix == ".webp":
        image.save(file, format="WEBP", lossless=True, exif=_exif(record, parameters))
    else:
        exif = _exif(record, parameters)
        image.save(file, format="JPEG", quality=LOSSY_QUALITY, subsampling=0, exif=exif)
    return file.getvalue()


def encode_animation(
    frames: Sequence[np.ndarray], record: dict[str, Any], parameters: str
) -> bytes:
    """An animated WebP of frames [H, W, 3] uint8, the last one shown for longer."""
    first, *others = [Image.fromarray(frame) for frame in frames]
    file = io.BytesIO()
    durations = [FRAME_MILLISECONDS] * len(others) + [LAST_FRAME_MILLISECONDS]
    first.save(
        file,
        format="WEBP",
        save_all=True,
        append_images=others,
        duration=durations,
        loop=0,
        quality=LOSSY_QUALITY,
        exif=_exif(record, parameters),
    )
    return file.getvalue()


def fit_record(
    record: dict[str, Any], suffix: str, parameters_of: Callable[[dict[str, Any]], str]
) -> tuple[dict[str, Any], list[str]]:
    """What of a record a picture's metadata hold, and the names of what is shortened for that.

    Args:
        parameters_of: the text for web UIs of a record's settings.
    """

    def fits(record: dict[str, Any]) -> bool:
        exif = _exif(record, parameters_of(record["settings"]))
        return suffix != ".jpg" or len(exif.tobytes()) <= MOST_JPEG_EXIF

    if fits(record):
        return record, []
    apart: dict[str, Any] = {n: record[n] for n in ("flags", "overrides") if n in record}
    whole = {**record["settings"], **apart}
    for most in _KEPT_OF_TEXTS:
        settings = {name: _shortened(value, most) for name, value in whole.items()}
        names = [name for name, value in settings.items() if value != whole[name]]
        cut = {name: settings.pop(name) for name in apart}
        short = {**record, "settings": settings, **cut, "shortened": names}
        if fits(short):
            break
    return short, names


def _shortened(value: Any, most: int) -> Any:
    """A setting whose texts keep so many characters, and its lists a twentieth of it items."""
    if isinstance(value, str):
        return shorten(value, most)
    if isinstance(value, list):
        return [_shortened(each, most) for each in value[: most // 20]]
    if isinstance(value, dict):
        return {name: _shortened(each, most) for name, each in value.items()}
    return value


def _to_text(record: dict[str, Any]) -> str:
    content = {"format_version": FORMAT_VERSION, **record}
    return json.dumps(content, sort_keys=True, ensure_ascii=False)


def _exif(record: dict[str, Any], parameters: str) -> Image.Exif:
    exif = Image.Exif()
    folder = exif.get_ifd(EXIF_FOLDER)
    folder[USER_COMMENT] = UNICODE_MARK + parameters.encode("utf-16-be")
    folder[MAKER_NOTE] = _to_text(record).encode()
    return exif


def read_texts(image: Image.Image) -> tuple[str, str]:
    """The record of ours in a picture's metadata, and the text for web UIs; empty for none."""
    if image.format == "PNG":
        texts = [image.info.get(name, "") for name in (HEADER_KEY, "parameters")]
        return texts[0], texts[1]
    note = image.getexif().get_ifd(EXIF_FOLDER).get(MAKER_NOTE)
    record = note.decode("utf-8", "replace") if isinstance(note, bytes) else ""
    return record, read_web_ui_parameters(image)


def read_picture_record(path: Path) -> dict[str, Any] | None:
    """Decode a picture fully and read the record inside. None: damaged, or no record of ours.

    Raises:
        BadInputFileError: another version of this program made it.
    """
    try:
        with Image.open(path) as image:
            image.load()
            record = json.loads(read_texts(image)[0])
            if path.suffix == ".png" and record["pixels_sha256"] != hash_pixels(np.asarray(image)):
                return None
    except (OSError, ValueError, KeyError, SyntaxError, TypeError, Image.DecompressionBombError):
        return None
    if not isinstance(record, dict):
        return None
    again = f"make it again: {maker_of(PICTURES).command} --output_dir {path.parent}"
    refuse_other_format(path, record.pop("format_version", 1), again)  # the first named none
    return record


def read_web_ui_parameters(image: Image.Image) -> str:
    """The text for web UIs in a picture's metadata, whoever wrote it; empty where there is none."""
    if text := image.info.get("parameters"):
        return str(text)
    comment = image.getexif().get_ifd(EXIF_FOLDER).get(USER_COMMENT, b"")
    if not isinstance(comment, bytes) or not comment.startswith(UNICODE_MARK):
        return ""
    return comment.removeprefix(UNICODE_MARK).decode("utf-16-be", "replace")


def web_ui_parameters(settings: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """The settings in the text form that the common web UIs read from pictures.

    Args:
        settings: a picture's own; the sampler as web UIs call it.
        names: setting → what web UIs call it.
    """
    lines = [settings.get("prompt") or ""]
    if settings.get("negative_prompt"):
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    values = {
        label: settings[name] for name, label in names.items() if settings.get(name) is not None
    }
    if settings.get("timesteps"):
        values["Steps"] = len(settings["timesteps"])
    if settings.get("sigmas"):
        values["Steps"] = len(settings["sigmas"]) - 1
    if {"width", "height"} <= settings.keys():  # of grids not, where they are not those of all
        values["Size"] = f"{settings['width']}x{settings['height']}"
    order = [label for label in WEB_UI_ORDER if label in values]
    order += [label for label in values if label not in WEB_UI_ORDER]
    lines.append(", ".join(f"{label}: {_quoted(values[label])}" for label in order))
    return "\n".join(lines)


def _quoted(value: Any) -> str:
    """A value in one line, in quotes where it holds what separates values (the web UI's rule)."""
    text = str(value)
    if not any(mark in text for mark in ",:\n"):
        return text
    return json.dumps(text, ensure_ascii=False)
