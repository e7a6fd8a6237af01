"""Runs of the stages in one process of its own, for what is not to change the tests' process."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conftest import PROJECT_DIR, xla_flags

PROGRAM = """
import contextlib, io, json, sys
{first}
from common.files.stage_table import STAGES, numbered
from common.process import run_in_process
from common.runs.stage_run import ResidentStage

residents = {{stage.number: ResidentStage(stage) for stage in STAGES}}
ended = []
for number, *flags in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code, error = run_in_process(residents[number].command, flags, numbered(number).name)
    ended.append([code, error or "", said.getvalue()])
print(json.dumps(ended))
"""
# Runs that come as lines, each with nothing of those before it but what is imported.
ONE_BY_ONE = """
import contextlib, io, json, os, sys
from common.files.stage_table import STAGES
from common.process import run_in_process
from common.runs.stage_run import ResidentStage

stages = {stage.number: stage for stage in STAGES}
for line in sys.stdin:
    number, *flags = json.loads(line)
    said, complained = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
        stage = ResidentStage(stages[number])
        code, error = run_in_process(stage.command, flags, f"python stages/{stages[number].script}")
    if error is not None:
        complained.write(f"error: {error}\\n")
    print(json.dumps([code, said.getvalue(), complained.getvalue()]), flush=True)
"""
# What help pages and docs/settings.md say, and what `--sweep` takes.
PAGES = """
import json, sys
{first}
from common.files.stage_table import STAGES
from common.runs.flags import all_flags, command_of
from common.runs.sweep import sweepable
from tools.settings_page import page

commands = {{stage.number: command_of(stage, print, "") for stage in STAGES}}
flags = {{n: {{p.name: p.help for p in command.params}} for n, command in commands.items()}}
print(json.dumps([flags, page(all_flags()), list(sweepable())]))
"""


@dataclass(frozen=True)
class Ended:
    """How a stage's run ended: its exit code, the sentence of a failure, what it said."""

    code: int
    error: str
    said: str


@dataclass(frozen=True)
class Pages:
    """What the stages' help pages and docs/settings.md say, and what `--sweep` takes."""

    help: dict[int, dict[str, str]]  # stage → flag → its text
    settings: str
    swept: list[str]

    def stages_with(self, flag: str) -> dict[int, str]:
        """The stages that have a flag, with its text there."""
        return {number: flags[flag] for number, flags in self.help.items() if flag in flags}

    def row(self, name: str) -> list[str]:
        """The cells of a row of docs/settings.md that begins with a name in backticks."""
        (line,) = (r for r in self.settings.splitlines() if r.startswith(f"| `{name}` |"))
        return [cell.strip() for cell in line.strip("|").split(" | ")]


class StageProcess:
    """A process that runs stages as they are asked for, so that libraries are imported once."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", ONE_BY_ONE],
            cwd=PROJECT_DIR,
            env={name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def run(self, number: int, *flags: object) -> "subprocess.CompletedProcess[str]":
        """One stage's run, as `conftest.run_script` returns it."""
        given, asked = self._process.stdin, self._process.stdout
        assert given is not None and asked is not None
        arguments = [number, *map(str, flags)]
        given.write(json.dumps(arguments) + "\n")
        given.flush()
        return subprocess.CompletedProcess(arguments, *json.loads(asked.readline()))

    def close(self) -> None:
        self._process.communicate()


def import_from(folder: Path, module: str) -> str:
    """A statement for `first` that imports a test's own module."""
    return f"sys.path.insert(0, {str(folder)!r}); import {module}"


def run_stages(
    runs: Sequence[Sequence[Any]], *, tree: Path = PROJECT_DIR, first: str = "", devices: int = 1
) -> list[Ended]:
    """Run stages, each as its number and flags, by the code of a tree.

    Args:
        first: statements before anything of the project is imported.
        devices: that jax finds.
    """
    given = json.dumps([[number, *map(str, flags)] for number, *flags in runs])
    return [Ended(*each) for each in json.loads(_run(PROGRAM, tree, first, given, devices))]


def read_pages(*, tree: Path = PROJECT_DIR, first: str = "") -> Pages:
    """The pages of a tree's commands; `first` as in `run_stages`."""
    flags, settings, swept = json.loads(_run(PAGES, tree, first))
    return Pages({int(number): texts for number, texts in flags.items()}, settings, swept)


def _run(program: str, tree: Path, first: str, given: str = "", devices: int = 1) -> str:
    """What a program says in its last line."""
    environment = os.environ | {
        "PYTHONPATH": str(tree),
        "XLA_FLAGS": xla_flags(devices),
    }
    result = subprocess.run(
        [sys.executable, "-c", program.format(first=first), given],
        cwd=tree,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1]
