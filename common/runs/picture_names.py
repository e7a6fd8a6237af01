"""The names of a run's pictures: by number, by their prompts' ids, or by a template."""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Formatter
from typing import Any, NamedTuple

from common.errors import BadSettingError, listed
from common.files.picture_files import OUR_NAME, ImageFormat, numbered
from common.runs.generation import GenerationConfig
from common.runs.run_index import refuse_foreign, require_parquet

# What a template may name; all but the first two are settings.
FIELDS = (
    *("index", "id", "prompt", "negative_prompt", "seed", "height", "width"),
    *("num_inference_steps", "guidance_scale", "scheduler", "model_id"),
)
MOST_BYTES = 180  # of a name; file systems take 255 with the endings of temporary files
# Not letters, digits or one of these in any file system's names, shells and web pages alike.
_UNSAFE = re.compile(r"[^\w .,()+=@-]+")
# Windows' names of devices, whatever the ending (learn.microsoft.com, "Naming Files").
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


class ImageId(NamedTuple):
    """What an image is called by its prompt."""

    id: str | None  # its prompt's
    number: int | None  # among the prompt's images; None where it is the only one


def names_of(
    settings: Sequence[Mapping[str, Any]],
    ids: Sequence[ImageId],
    template: str | None,
    image_format: ImageFormat,
) -> list[str]:
    """The file name of every image.

    Args:
        settings: of each image; for a template.
        ids: of each image, as `ids_of` gives them.
        template: as of `--name_template`.

    Raises:
        BadSettingError: the template cannot be read, or two images have the same name.
    """
    plain = numbered("output_image", len(settings), image_format)
    names = []
    for index, (own, (id, place)) in enumerate(zip(settings, ids, strict=True)):
        if template is not None:
            values = {**own, "index": index, "id": id}
            names.append(f"{safe_name(_fill(template, values))}.{image_format}")
        elif id is not None:
            number = "" if place is None else f"_{place:04d}"
            names.append(f"{safe_name(id)}{number}.{image_format}")
        else:
            names.append(plain[index])
    if names != plain:
        _refuse_same(names, template)
    return names


def ids_of(config: GenerationConfig, images: int) -> list[ImageId]:
    """The ids of all images; none where the images are not those of the prompts."""
    counts = config.images_of_prompts()
    if sum(counts) != images:  # latents from elsewhere
        return [ImageId(None, None)] * images
    return [
        ImageId(prompt.id, number if count > 1 else None)
        for prompt, count in zip(config.prompts, counts, strict=True)
        for number in range(count)
    ]


def refuse_bad_names(config: GenerationConfig, run_dir: Path) -> None:
    """Raise before anything is computed where pictures or their list could not be written.

    Raises:
        BadSettingError: as `names_of`; or a file that is not ours has such a name.
        UnfitEnvironmentError: the list is wanted in a format whose package is not there.
    """
    if config.index == "parquet":
        require_parquet()
    shared = config.model_dump(exclude={"prompts"})
    own = [
        {**shared, **prompt.settings, "prompt": prompt.prompt}
        | {"negative_prompt": prompt.negative_prompt}
        for prompt, count in zip(config.prompts, config.images_of_prompts(), strict=True)
        for _ in range(count)
    ]
    settings = [each | {"seed": seed} for each, seed in zip(own, config.image_seeds(), strict=True)]
    ids = ids_of(config, len(settings))
    names = names_of(settings, ids, config.name_template, config.image_format)
    refuse_foreign(run_dir, names)
    begun = {place for prompt in config.prompts for place in (prompt.image, prompt.mask_image)}
    taken = {Path(place).resolve() for place in begun if place is not None}
    for name in names if taken else ():
        if (run_dir / name).resolve() in taken:
            raise BadSettingError(
                f"{run_dir / name} is a picture that the run begins with, and a picture of the run "
                "would take its place: choose another --output_dir"
            )


def safe_name(text: str) -> str:
    """A text as a file's name that every file system takes, without an ending."""
    name = _UNSAFE.sub("_", unicodedata.normalize("NFC", text))
    name = name.encode()[:MOST_BYTES].decode(errors="ignore").strip(" .").lstrip("-")
    return f"_{name}" if not name or _DEVICES.fullmatch(name) else name


def _fill(template: str, values: Mapping[str, Any]) -> str:
    filled = []
    try:
        for text, name, spec, conversion in Formatter().parse(template):
            filled.append(text)
            if name is None:
                continue
            if name not in FIELDS or conversion is not None or "{" in (spec or ""):
                raise BadSettingError(
                    f"--name_template: {{{name}}} is none of {listed([f'{{{f}}}' for f in FIELDS])}"
                )
            value = values.get(name)
            filled.append(format("" if value is None else value, spec or ""))
    except (ValueError, TypeError) as error:
        raise BadSettingError(f"--name_template {template!r} cannot be read: {error}") from None
    return "".join(filled)


def _refuse_same(names: Sequence[str], template: str | None) -> None:
    """Raise where two names are one on some file system, or are those of other files of ours."""
    known: dict[str, int] = {}
    for index, name in enumerate(names):
        same = known.setdefault(name.casefold(), index)
        if same != index:
            what, mend = "the prompts' ids give", "give each an id of its own"
            if template is not None:
                what = f"--name_template {template!r} gives"
                mend = "put {index} first, or shorten texts, as {prompt:.40}"
            raise BadSettingError(
                f"{what} the images {same} and {index} the same name, {name}: {mend}"
            )
        if OUR_NAME.fullmatch(name) and "image" not in name:
            raise BadSettingError(f"an image cannot be called {name}: that is another file's name")
