"""Settings declared once: default, bounds, flag, help, what a value shapes, its name elsewhere.

    guidance_scale: float = setting(
        7.5, "Guidance; 1 or less is none.", metavar="X", group=SAMPLING,
        shapes=(LATENTS,), web_ui="CFG scale", ge=0,
    )

Flags and help pages, config files, recipes and what makes them stale, a picture's metadata and
docs/settings.md follow from such declarations; nothing else lists settings.
"""

import difflib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from common.errors import BadSettingError, shorten

# What stages make; a setting names those that its value shapes.
EMBEDDINGS, IMAGE_LATENTS, LATENTS, PICTURES = "embeddings", "image_latents", "latents", "pictures"
# Groups of the help page.
PROMPTS, INPUT, SAMPLING = "Prompts", "Pictures to begin with", "Sampling"
SIZES = "Size conditions of SDXL"
MODEL, FILES, RUNNING, TPU = "Model", "Files", "Running", "A TPU that is not there"

Dtype = Literal["float32", "bfloat16"]
DeviceDtype = Literal["auto", "float32", "bfloat16"]
Model = TypeVar("Model", bound=BaseModel)


def _is_unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("it holds bytes that are no UTF-8 text") from None
    return text


def home_written_out(path: str) -> str:
    """A path with its ~ replaced; another user's that is not known stays."""
    return os.path.expanduser(path)  # noqa: PTH111  # pathlib's raises there


def _names_a_place(text: str) -> str:
    if not text:
        raise ValueError("it is empty: leave it out, or give a name")
    if "\0" in text:
        raise ValueError("give a name without NUL characters")
    return home_written_out(text)


Text = Annotated[str, AfterValidator(_is_unicode)]
Word = Annotated[str, Field(min_length=1), AfterValidator(_is_unicode)]
Place = Annotated[Text, AfterValidator(_names_a_place)]  # a path or a hub id


@dataclass(frozen=True, kw_only=True)
class Declared:
    """What is declared of a setting or option besides its name, type, default and bounds."""

    text: str  # of the help page, one line
    metavar: str
    group: str  # of the help page
    makes: tuple[str, ...]  # the artifacts that it shapes, or that it helps to make
    determines: bool  # a setting of a run, not only how a stage computes
    # In a recipe as it stands; else `runs.recipes` records what it comes to, such as a file's
    # content in place of its name.
    recorded: bool
    kind: Any  # of the flag's value, where pydantic reads it from a text; None: the field's own
    many: bool  # the flag is given once for each of several
    flag: str | None  # its name where that is not the setting's
    none_flag: tuple[str, str] | None  # a flag that stands for None, and its help
    web_ui: str | None  # its name in the text that web UIs read from a picture
    shown: str | None  # in brackets in place of the default; "" for nothing
    swept: bool  # `run_all.sh --sweep` takes it
    of_prompts: bool  # a prompt may have its own, in place of the run's
    alone: bool  # of a stage that is run alone, not of `run_all.sh`


class Settings(BaseModel):
    """A group of settings, declared in the package whose they are."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic takes true for 1, also where a config file gives it for steps or a seed."""
        assert info.field_name is not None
        kind = cls.model_fields[info.field_name].annotation
        if isinstance(value, bool) and bool not in (kind, *get_args(kind)):
            raise ValueError("give a number or text, not true or false")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _home_is_written_out(cls, value: Any) -> Any:
        """Shells leave ~ alone in `--flag=~/file`, in config files and in quotes."""
        return Path(home_written_out(str(value))) if isinstance(value, Path) else value


def setting(
    default: Any,
    text: str,
    *,
    shapes: tuple[str, ...],
    metavar: str,
    group: str,
    web_ui: str | None = None,
    **further: Any,
) -> Any:
    """Declare a setting of a run.

    Args:
        text: its meaning, in one line of the help page.
        shapes: the artifacts that its value determines. Stage 1 takes all settings, a later stage
            those that shape what it makes.
        metavar: what the flag takes; " " for a switch.
        group: of the help page.
        web_ui: its name in the text that web UIs read from a picture.
        further: fields of `Declared` (`recorded`, `many`, `flag`, …), and pydantic's bounds.
    """
    return _declare(default, text, shapes, metavar, group, True, web_ui=web_ui, **further)


def option(
    default: Any,
    text: str,
    *,
    helps_make: tuple[str, ...],
    metavar: str,
    group: str = RUNNING,
    **further: Any,
) -> Any:
    """Declare how stages compute, which changes nothing in what they compute.

    Args:
        helps_make: the artifacts whose stages take it.
        further: as in `setting`.
    """
    return _declare(default, text, helps_make, metavar, group, False, **further)


def _declare(
    default: Any,
    text: str,
    makes: tuple[str, ...],
    metavar: str,
    group: str,
    determines: bool,
    **further: Any,
) -> Any:
    own = {name: further.pop(name) for name in list(further) if name in Declared.__annotations__}
    defaults: dict[str, Any] = dict(
        recorded=determines,
        kind=None,
        many=False,
        flag=None,
        none_flag=None,
        web_ui=None,
        shown=None,
        swept=True,
        alone=False,
        of_prompts=False,
    )
    declared = Declared(
        text=text,
        makes=makes,
        metavar=metavar,
        group=group,
        determines=determines,
        **{**defaults, **own},
    )
    # A dict as default is copied by pydantic for each instance.
    extra: Any = {"declared": declared}
    return Field(default=default, json_schema_extra=extra, **further)


def declarations(model: type[BaseModel]) -> Iterator[tuple[str, Declared]]:
    """The declared fields of a model, by their names."""
    for name, field in model.model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and "declared" in extra:
            yield name, extra["declared"]  # type: ignore[misc]


def flag_of(model: type[BaseModel], name: str) -> str:
    """The flag that gives a field of a model; a name that is not declared is its own."""
    declared = dict(declarations(model)).get(name)
    return declared.flag if declared is not None and declared.flag is not None else name


def validate(model: type[Model], values: Any, source: str) -> Model:
    """Build a model, or raise one sentence about the first thing that is wrong in `source`.

    Raises:
        BadSettingError: an unknown key or a bad value; `source` "flags" names the flag.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    reason = first["msg"].removeprefix("Value error, ")
    reason = reason[0].lower() + reason[1:]
    if not name:
        raise BadSettingError(f"{source}: {reason}")
    if first["type"] == "extra_forbidden" and len(first["loc"]) == 1:
        near = difflib.get_close_matches(name, model.model_fields, n=1, cutoff=0)
        raise BadSettingError(f"{source}: unknown setting {name!r}; did you mean {near[0]!r}?")
    flag = flag_of(model, str(first["loc"][0]))
    what = f"--{flag}" if source == "flags" else f"{source}: {name}"
    if first["type"] == "missing":
        raise BadSettingError(f"{what} is missing")
    raise BadSettingError(f"{what} {shorten(repr(first['input']), 60)}: {reason}")
