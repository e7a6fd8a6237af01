"""Commands of typer with flags spelled as in the ecosystem."""

from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from common.declared import RUNNING


def flag(name: str, metavar: str, group: str, text: str) -> Any:
    """Declare a flag: its name, what it takes, its group in the help, its meaning in one line."""
    # The help is rich markup, in which a bracket must be escaped.
    return typer.Option(
        f"--{name}",
        metavar=metavar,
        rich_help_panel=group,
        help=text.replace("[", r"\["),
        show_default=False,
    )


Debug = Annotated[bool, flag("debug", " ", RUNNING, "Show tracebacks and library messages.")]


def make_command(function: Callable[..., Any]) -> TyperCommand:
    """A command whose flags are spelled with underscores; hyphens work too."""
    app = typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={
            "token_normalize_func": lambda token: token.replace("-", "_"),
            "help_option_names": ["--help"],
        },
    )
    app.command()(function)
    command = typer.main.get_command(app)
    assert isinstance(command, TyperCommand)
    return command
