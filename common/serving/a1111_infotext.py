"""Settings as AUTOMATIC1111's web UI writes them: read from pictures, told of those just made."""

import io
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image

from common.errors import BadSettingError
from common.files.input_pictures import FORMATS, UNREADABLE
from common.files.picture_files import read_web_ui_parameters
from common.runs.run_index import read_index

NEGATIVE = "Negative prompt:"
# `Steps: 20, Model: "a, b"`: a name, and a value, which is in quotes where it holds a comma.
_PAIR = re.compile(r'(\w[\w \-/]{1,60}):\s*("(?:[^"\\]|\\.)*"|[^,]*)(?:,|$)')
FEWEST_PAIRS = 3  # a last line with fewer is a part of the prompt


def infotext_of(data: bytes) -> tuple[str, dict[str, str]]:
    """The text in an encoded picture's metadata, and the other texts there.

    Raises:
        BadSettingError: it is no picture.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            text = read_web_ui_parameters(image)
            items = {
                str(name): value for name, value in image.info.items() if isinstance(value, str)
            }
    except UNREADABLE:
        raise BadSettingError("image is no PNG, JPEG or WebP that opens: give one") from None
    items.pop("parameters", None)
    return text, items


def parse_infotext(text: str) -> dict[str, str]:
    """The settings in such a text, by the web UI's names; of `Size` both sides as well."""
    *lines, last = text.strip().split("\n")
    pairs = _PAIR.findall(last)
    if len(pairs) < FEWEST_PAIRS:
        lines, pairs = [*lines, last], []
    parts: dict[str, list[str]] = {"Prompt": [], "Negative prompt": []}
    current = "Prompt"
    for line in lines:
        if line.startswith(NEGATIVE):
            current, line = "Negative prompt", line.removeprefix(NEGATIVE).strip()
        parts[current].append(line)
    found = {name: "\n".join(lines).strip() for name, lines in parts.items()}
    for name, value in pairs:
        found[name] = _unquoted(value.strip())
    if match := re.fullmatch(r"(\d+)x(\d+)", found.get("Size", "")):
        found |= {"Size-1": match[1], "Size-2": match[2]}
    return found


def _unquoted(value: str) -> str:
    if value.startswith('"'):
        with suppress(ValueError):
            return str(json.loads(value))
    return value


def told_of(run_dir: Path, files: Sequence[Path], asked: dict[str, Any]) -> dict[str, Any]:
    """What an answer's `info` says of the pictures.

    Args:
        files: the pictures.
        asked: what is the same for all of them, by the web UI's names.
    """
    seeds = [int(line["seed"]) for line in read_index(run_dir)]
    texts = [infotext_of(path.read_bytes())[0] for path in files]
    with Image.open(files[0]) as first:
        width, height = first.size
    several = {f"all_{name}s": [asked[name]] * len(files) for name in ("prompt", "negative_prompt")}
    return {
        **asked,
        **several,
        "seed": seeds[0],
        "all_seeds": seeds,
        "subseed": seeds[0],
        "all_subseeds": seeds,
        "subseed_strength": 0,
        "width": width,
        "height": height,
        "batch_size": len(files),
        "index_of_first_image": 0,
        "infotexts": texts,
        "styles": [],
        "extra_generation_params": {},
        "restore_faces": False,
        "face_restoration_model": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
    }
