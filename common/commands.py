"""Commands of typer with flags spelled as in the ecosystem."""

import functools
import inspect
import shutil
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from common.declared import RUNNING, home_written_out

PACKAGE = "staged-diffusion"
# In boxes a flag's name is cut where the terminal is narrow; without them the text wraps below it.
IN_BOXES = shutil.get_terminal_size().columns >= 80


def flag(name: str, metavar: str, group: str, text: str, *, least: int | None = None) -> Any:
    """Declare a flag: its name, what it takes, its group in the help, its meaning in one line.

    Args:
        least: of a number.
    """
    return typer.Option(
        f"--{name}",
        metavar=metavar,
        rich_help_panel=group,
        # The help in boxes is rich markup, in which a bracket must be escaped.
        help=text.replace("[", r"\[") if IN_BOXES else text,
        show_default=False,
        min=least,
    )


Debug = Annotated[bool, flag("debug", " ", RUNNING, "Show tracebacks and library messages.")]


@dataclass(frozen=True)
class FlagsOf:
    """Flags that another command's function declares."""

    function: Callable[..., Any]
    names: Set[str]

    def parameters(self) -> Iterator[inspect.Parameter]:
        """What the command's function takes."""
        found = inspect.signature(self.function).parameters.values()
        yield from (parameter for parameter in found if parameter.name in self.names)


def make_command(function: Callable[..., Any]) -> TyperCommand:
    """A command whose flags are spelled with underscores; hyphens work too, and ~ in paths."""

    @functools.wraps(function)
    def at_home(**parameters: Any) -> Any:
        given = {name: parameters[name] for name in signature.parameters}
        for value in given.values():
            if isinstance(value, TyperCommand.context_class):
                value.params = _at_home(value.params)
        return function(**_at_home(given))

    signature = inspect.signature(function)
    version = inspect.Parameter(
        "version",
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[
            bool | None,
            typer.Option(
                "--version",
                metavar=" ",
                help="Show the version and exit.",
                callback=_print_version,
                is_eager=True,
                expose_value=False,
                show_default=False,
            ),
        ],
    )
    parameters = [*signature.parameters.values(), version]
    at_home.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    at_home.__annotations__ = {p.name: p.annotation for p in parameters}
    app = typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich" if IN_BOXES else None,
        context_settings={
            "token_normalize_func": lambda token: token.replace("-", "_"),
            "help_option_names": ["-h", "--help"],
        },
    )
    app.command()(at_home)
    command = typer.main.get_command(app)
    assert isinstance(command, TyperCommand)
    return command


def _print_version(asked: bool | None) -> None:
    if asked:
        from importlib.metadata import version

        print(f"{PACKAGE} {version(PACKAGE)}")
        raise typer.Exit


def _at_home(parameters: dict[str, Any]) -> dict[str, Any]:
    """Parameters with the ~ of paths replaced, which the shell left alone as in `--flag=~/file`."""

    def written_out(value: Any) -> Any:
        if isinstance(value, list):
            return [written_out(each) for each in value]
        return Path(home_written_out(str(value))) if isinstance(value, Path) else value

    return {name: written_out(value) for name, value in parameters.items()}
