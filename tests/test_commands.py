"""Flags are spelled with underscores or hyphens, and explained in groups."""

from typing import Annotated

import pytest
from typer.exceptions import TyperException

from common.commands import Debug, flag, make_command

given: list[tuple[int, bool]] = []


def run(
    batch_size: Annotated[int, flag("batch_size", "N", "Running", "At once [8].")] = 8,
    debug: Debug = False,
) -> None:
    """Do something."""
    given.append((batch_size, debug))


def call(*arguments: str) -> None:
    make_command(run).main(list(arguments), "run", standalone_mode=False)


def test_hyphens_are_underscores() -> None:
    given.clear()
    call("--batch_size", "3", "--debug")
    call("--batch-size=4")
    call()
    assert given == [(3, True), (4, False), (8, False)]


@pytest.mark.parametrize("arguments", [["--batch", "3"], ["--batch_size", "many"], ["extra"]])
def test_what_no_flag_takes_is_refused(arguments: list[str]) -> None:
    with pytest.raises(TyperException):
        call(*arguments)


def test_help_shows_groups_and_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    call("--help")
    page = capsys.readouterr().out
    for words in ("Do something.", "Running", "--batch_size", "At once [8].", "--debug"):
        assert words in page
    assert "--install-completion" not in page
