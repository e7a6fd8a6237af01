"""Flags are spelled with underscores or hyphens, and explained in groups."""

from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
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


def test_a_path_in_the_home_folder_is_written_out_for_all_who_read_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also in the context's parameters, by which stages and `run_all.sh` know what was given."""
    monkeypatch.setenv("HOME", "/home/me")
    heard: list[Any] = []

    def run(
        context: typer.Context,
        one: Annotated[Path, flag("one", "DIR", "Files", "A folder.")],
        many: Annotated[list[Path], flag("many", "DIR", "Files", "Folders.")],
    ) -> None:
        heard.extend([one, many, context.params["one"], context.params["many"]])

    make_command(run).main(
        ["--one=~/a", "--many", "~/b", "--many", "c~/d"], "run", standalone_mode=False
    )
    one, many = Path("/home/me/a"), [Path("/home/me/b"), Path("c~/d")]
    assert heard == [one, many, one, many]
