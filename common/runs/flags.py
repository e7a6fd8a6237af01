"""The flags of the stages' commands, generated from what is declared, and what they give."""

import inspect
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from typer.core import TyperCommand

from common.commands import FlagsOf, flag, make_command
from common.compute.options import ALL, ON_DEVICES, RunOptions, read_run_options
from common.declared import (
    EMBEDDINGS,
    FILES,
    IMAGE_LATENTS,
    INPUT,
    LATENTS,
    MODEL,
    PICTURES,
    PROMPTS,
    RUNNING,
    SAMPLING,
    SIZES,
    TPU,
    Declared,
    Settings,
    declarations,
    flag_of,
    option,
    validate,
)
from common.errors import BadSettingError
from common.files.run_files import DEFAULT_OUTPUT_DIR
from common.files.stage_table import FIRST, Stage
from common.progress import Form
from common.runs.generation import GenerationConfig, RunSettings
from common.runs.setting_groups import ASKED, SHARED
from common.sampling.sampling_settings import parse_scheduler_options

GROUPS = (PROMPTS, INPUT, SAMPLING, SIZES, MODEL, FILES, RUNNING, TPU)  # as the help page has them
IN_BRACKETS = "Defaults stand in brackets; hyphens in flags work as well."


_of_serving = partial(option, helps_make=ALL, swept=False, alone=True)
# What goes with `--serve` alone.
OF_SERVING = ("jobs_dir", "keep", "chips", "max_wait_ms")


class StageFlags(Settings):
    """What a stage's command takes besides settings and options."""

    dtype: str | None = option(
        None,
        "This stage's own dtype.",
        metavar="DTYPE",
        group=MODEL,
        helps_make=ALL,
        swept=False,
        shown="",
    )
    config: Path | None = option(
        None,
        "YAML file of settings; flags win over it.",
        metavar="FILE",
        group=FILES,
        helps_make=(EMBEDDINGS,),
        swept=False,
        shown="",
    )
    output_dir: Path | None = option(
        None,
        "The run directory.",
        metavar="DIR",
        group=FILES,
        helps_make=ALL,
        swept=False,
        shown=str(DEFAULT_OUTPUT_DIR),
    )
    input_dir: Path | None = option(
        None,
        "Where the inputs are.",
        metavar="DIR",
        group=FILES,
        helps_make=ON_DEVICES,
        swept=False,
        shown="the output_dir",
    )
    offline: bool = option(
        False, "Never use the network.", metavar=" ", group=FILES, helps_make=ALL, shown=""
    )
    wait: bool = option(
        False, "Wait for who uses the run directory.", metavar=" ", helps_make=ALL, shown=""
    )
    skip_fresh: bool = option(
        False,
        "Do nothing where the outputs are fresh.",
        metavar=" ",
        helps_make=ALL,
        alone=True,
        shown="",
    )
    only: str | None = option(
        None,
        "Make these images anew, as 7,9-12.",
        metavar="N,…",
        helps_make=(EMBEDDINGS, LATENTS, PICTURES),
        swept=False,
        shown="",
    )
    stream: bool = option(
        False,
        "Decode while stage 2 runs.",
        metavar=" ",
        helps_make=(PICTURES,),
        alone=True,
        shown="",
    )
    serve: str | None = _of_serving(
        None,
        "Stay and do these stages' jobs, as 0,2,3.",
        metavar="N,…",
        shown="",
    )
    jobs_dir: Path | None = _of_serving(
        None,
        "Where they are.",
        metavar="DIR",
        shown="",
    )
    keep: int = _of_serving(
        2,
        "Checkpoints to keep in memory.",
        metavar="N",
        ge=1,
    )
    chips: str | None = _of_serving(
        None,
        "Those that it has, as 0-3.",
        metavar="N,…",
        shown="all",
    )
    max_wait_ms: int = _of_serving(
        0,
        "Wait for jobs to batch.",
        metavar="N",
        ge=0,
    )
    keep_overrides: bool = option(
        False,
        "Go on with what flags overrode.",
        metavar=" ",
        helps_make=ON_DEVICES,
        shown="",
    )
    progress: Form = option(
        "auto",
        "auto, lines, json, off.",
        metavar="FORM",
        helps_make=ALL,
        swept=False,
    )
    debug: bool = option(
        False, "Show tracebacks and library messages.", metavar=" ", helps_make=ALL, shown=""
    )
    topology: str | None = option(
        None,
        "Compile for it and do not run, as v6e:2x4.",
        metavar="NAME",
        group=TPU,
        helps_make=ON_DEVICES,
        alone=True,
        shown="",
    )
    pictures_shape: str | None = option(
        None,
        "Of which pictures.",
        metavar="N,H,W",
        group=TPU,
        helps_make=(IMAGE_LATENTS, PICTURES),
        alone=True,
        shown="1, the checkpoint's own",
    )
    save_hlo: Path | None = option(
        None,
        "The compiled program, as text.",
        metavar="FILE",
        group=TPU,
        helps_make=ON_DEVICES,
        alone=True,
        shown="",
    )
    json_file: Path | None = option(
        None,
        "The estimate, as JSON.",
        metavar="FILE",
        group=TPU,
        helps_make=ON_DEVICES,
        alone=True,
        flag="json",
        shown="",
    )


@dataclass(frozen=True, kw_only=True)
class Flag:
    """A flag of one or more commands."""

    model: type[BaseModel]  # that declares it
    field: str  # of the model
    declared: Declared
    name: str  # without its hyphens

    def is_of(self, stage: Stage) -> bool:
        """The first stage settles all settings; a later one takes what shapes what it makes.

        Of what is resolved into another form, such as prompts, it takes nothing.
        """
        if self.declared.determines:
            if stage is FIRST:
                return True
            if self.field not in GenerationConfig.model_fields:
                return False
        return stage.makes in self.declared.makes

    @property
    def has_value(self) -> bool:
        """Whether it takes a value; a switch takes none."""
        return self.kind is not bool

    @property
    def kind(self) -> Any:
        """The type that the command line makes of a value."""
        return self.declared.kind or _plain_type(self.model.model_fields[self.field].annotation)

    def default_in_words(self) -> str:
        """What holds where it is not given; empty where that is nothing."""
        if self.declared.shown is not None:
            return self.declared.shown
        return str(self.model.model_fields[self.field].default)

    def text(self) -> str:
        """Its meaning, with the default in brackets."""
        shown = self.default_in_words()
        return f"{self.declared.text} [{shown}]" if shown else self.declared.text

    def parameters(self) -> Iterator[inspect.Parameter]:
        """What the command's function takes."""
        kind = list[self.kind] if self.declared.many else self.kind  # type: ignore[name-defined]
        yield _parameter(self.name, kind, self.declared, self.text())
        if self.declared.none_flag is not None:
            name, text = self.declared.none_flag
            yield _parameter(name, bool, self.declared, text)


def _plain_type(annotation: Any) -> Any:
    """str, int, float, bool or Path: what the command line makes of a value of such a field."""
    if isinstance(annotation, type) and issubclass(annotation, bool | int | float | str | Path):
        return annotation
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return _plain_type(next(kind for kind in inner if kind is not type(None)))
    if origin is Annotated:
        return _plain_type(inner[0])
    if origin is Literal:
        return type(inner[0])
    return str


def _parameter(name: str, kind: Any, declared: Declared, text: str) -> inspect.Parameter:
    metavar = " " if kind is bool else declared.metavar
    return inspect.Parameter(
        name,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        default=None,
        annotation=Annotated[kind | None, flag(name, metavar, declared.group, text)],
    )


def all_flags() -> list[Flag]:
    """Every flag of every stage, in the order of the help page."""
    models: list[type[BaseModel]] = [*ASKED, *SHARED, StageFlags, RunOptions]
    flags = [
        Flag(model=model, field=name, declared=declared, name=declared.flag or name)
        for model in models
        for name, declared in declarations(model)
    ]
    return sorted(flags, key=lambda flag: GROUPS.index(flag.declared.group))


def command_of(stage: Stage, run: "Callable[[Given], int | None]", text: str) -> TyperCommand:
    """A stage's command.

    Args:
        run: is handed what was given; returns the exit code, if it is another than 0.
        text: what the command does, for its help page.
    """

    def command(context: typer.Context) -> int:
        return run(Given(stage, context.params)) or 0

    command.__doc__ = f"{inspect.cleandoc(text)}\n\n{IN_BRACKETS}"
    return add_flags(command, [flag for flag in all_flags() if flag.is_of(stage)])


def add_flags(function: Callable[..., Any], flags: Sequence[Flag | FlagsOf]) -> TyperCommand:
    """A command with the flags of a function and further ones, which reach it by its context.

    Args:
        function: takes typer's context as `context`.
    """
    own = inspect.signature(function)
    further = [parameter for flag in flags for parameter in flag.parameters()]

    def command(**parameters: Any) -> Any:
        return function(**{name: parameters[name] for name in own.parameters})

    signature = inspect.Signature([*own.parameters.values(), *further])
    command.__signature__ = signature  # type: ignore[attr-defined]
    command.__annotations__ = {
        name: parameter.annotation for name, parameter in signature.parameters.items()
    }
    command.__doc__ = function.__doc__
    return make_command(command)


class Given:
    """The flags that were given to a stage."""

    def __init__(self, stage: Stage, parameters: Mapping[str, Any]) -> None:
        """`parameters` are those of the stage's command by their names; None is not given."""
        self.stage = stage
        self.parameters = {k: v for k, v in parameters.items() if v not in (None, [], ())}

    @cached_property
    def flags(self) -> StageFlags:
        """Those that are neither settings nor options."""
        own = {flag_of(StageFlags, name): name for name in StageFlags.model_fields}
        given = {own[name]: value for name, value in self.parameters.items() if name in own}
        return validate(StageFlags, given, "flags")

    @cached_property
    def options(self) -> RunOptions:
        """How the stage is to compute. Raises `BadSettingError` for a bad value."""
        return read_run_options(self.parameters)

    @property
    def run_dir(self) -> Path:
        """Where the stage writes."""
        return self.flags.output_dir or self.flags.input_dir or DEFAULT_OUTPUT_DIR

    @property
    def source_dir(self) -> Path:
        """Where its input is."""
        return self.flags.input_dir or self.run_dir

    def settings(self) -> dict[str, Any]:
        """The settings of a run that were given, by their names.

        Raises:
            BadSettingError: two flags that say different things of one setting.
        """
        given: dict[str, Any] = {}
        for name, declared in declarations(RunSettings):
            flag_name = declared.flag or name
            if flag_name in self.parameters:
                given[name] = self.parameters[flag_name]
            if declared.none_flag is not None and self.parameters.get(declared.none_flag[0]):
                if name in given:
                    raise BadSettingError(
                        f"give either --{flag_name} or --{declared.none_flag[0]}, not both"
                    )
                given[name] = None
        if "scheduler_options" in given:
            given["scheduler_options"] = parse_scheduler_options(given["scheduler_options"])
        if self.flags.dtype is not None:
            if self.stage.dtype in given:
                raise BadSettingError(f"give either --dtype or --{self.stage.dtype}, not both")
            given[self.stage.dtype] = self.flags.dtype
        return given

    def refuse_topology_flags(self) -> None:
        """Raise `BadSettingError` for flags that mean something only with `--topology`."""
        for name in ("pictures_shape", "save_hlo", "json"):
            if name in self.parameters:
                raise BadSettingError(
                    f"--{name} is for --topology: give that as well, or leave it out"
                )
