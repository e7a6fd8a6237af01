"""The commands of README.md and docs/ run as they are written, one after the other.

A page's commands run in a copy of the tree: a fresh one for the README, as a clone is; for the
other pages one in which a run has been made, as the README says. The README's, and others that run
stages, are marked slow; those that need what no test has are named in NOT_RUN, each with the
reason, and of them scripts and flags are looked up.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import PROJECT_DIR

PAGES = [PROJECT_DIR / "README.md", *sorted((PROJECT_DIR / "docs").glob("*.md"))]
# What a command has in it → why no test runs it. Each must be needed.
NOT_RUN = {
    "gcloud": "needs an account of Google Cloud",
    "make": "runs all tests, these among them",
    "tools/set_up.sh": "installs packages from the network",
    "configs/sdxl_base_1024.yaml": "fetches SDXL from the network",
    "timbrooks/instruct-pix2pix": "fetches a checkpoint from the network",
    "--topology": "needs the TPU compiler; tests/tpu has it",
    "--distributed": "needs several hosts; tests/sharded has several processes",
    "--serve": "stays; tests/serving has it",
    "--remote_vae": "needs a server; tests/serving has one",
    "tools/serve_on_ray.py": "stays; tests/scale has it",
    "serve": "stays; tests/scale has it",
    "tools/run_on_ray.py": "takes minutes; tests/tools has it",
    "benchmarks/": "takes long on a machine of its own; tests/benchmarks has small ones",
}
README = "README.md"
RUN_STAGES = ("stages/", "./run_all.sh")
# Folders that the pages speak of as if the reader had them: two runs to compare.
RUNS_OF_A_READER = ("runs/a", "runs/b")
ASSIGNMENT = re.compile(r"\w+=")
COPIED = ("benchmarks", "common", "configs", "docs", "stages", "tools", "run_all.sh")


@dataclass(frozen=True)
class Command:
    """One command of a page."""

    page: str
    line: int
    text: str
    settles: tuple[str, ...]  # the page's assignments before it

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"

    @property
    def words(self) -> list[str]:
        """Without comments, and with the variables that stand for programs written out."""
        values = dict(line.split("=", 1) for line in self.settles)
        text = self.text
        for name, value in values.items():
            text = re.sub(rf"\${name}\b", " ".join(shlex.split(value)), text)
        return shlex.split(text, comments=True)

    @property
    def reason(self) -> str | None:
        """Why it is not run, or None."""
        return next((NOT_RUN[mark] for mark in NOT_RUN if self.has(mark)), None)

    def has(self, mark: str) -> bool:
        """Whether one of its words is the mark, or begins with a mark that ends in a slash."""
        return any(
            word == mark or (mark.endswith("/") and word.startswith(mark)) for word in self.words
        )

    @property
    def is_slow(self) -> bool:
        """Whether only the slow tests run it."""
        return self.page == README or any(map(self.has, RUN_STAGES))


def commands_of(page: Path) -> list[Command]:
    """The commands of a page's blocks of bash, in their order."""
    found: list[Command] = []
    settles: list[str] = []
    inside, begun = False, ""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if line.startswith("```"):
            inside = not inside and line.strip() == "```bash"
            continue
        if not inside or not shlex.split(begun + line.removesuffix("\\"), comments=True):
            continue
        begun += line.removesuffix("\\")
        if line.endswith("\\"):
            continue
        text, begun = begun.strip(), ""
        if ASSIGNMENT.match(text):
            settles.append(text)
        else:
            found.append(Command(page.name, number, text, tuple(settles)))
    return found


COMMANDS = {page.name: commands_of(page) for page in PAGES}
TO_RUN = {
    name: [command for command in commands if command.reason is None]
    for name, commands in COMMANDS.items()
}


def pages_with(*, slow: bool) -> list[str]:
    """The pages that have such commands to run."""
    return [name for name, all_ in TO_RUN.items() if any(c.is_slow == slow for c in all_)]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the project as a clone has it, set up with this environment's interpreter."""
    tree = tmp_path / "project"
    (tree / ".venv" / "bin").mkdir(parents=True)
    for name in COPIED:
        copy = shutil.copytree if (PROJECT_DIR / name).is_dir() else shutil.copy
        copy(PROJECT_DIR / name, tree / name)
    (tree / "models").symlink_to(PROJECT_DIR / "models")
    for path, content in (
        (tree / ".venv" / "bin" / "python", f'exec {shlex.quote(sys.executable)} "$@"'),
        (tree / "tools" / "set_up.sh", "# Set up already."),
    ):
        path.write_text(f"#!/bin/sh\n{content}\n")
        path.chmod(0o755)
    return tree


def run_in(tree: Path, commands: list[Command]) -> None:
    """Run commands in a copy of the project, each as a reader's shell would."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["PATH"] = f"{tree / '.venv' / 'bin'}{os.pathsep}{environment['PATH']}"
    for command in commands:
        result = subprocess.run(
            ["bash", "-c", "\n".join((*command.settles, command.text))],
            cwd=tree,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"


@pytest.fixture
def tree_of_a_reader(tree: Path, name: str, request: pytest.FixtureRequest) -> Path:
    """A copy of the project with the runs that a reader has who comes to a page."""
    words = {word for command in TO_RUN[name] for word in command.words}
    folders = [folder for folder in RUNS_OF_A_READER if folder in words]
    for folder in folders + ([] if name == README else ["stage_outputs"]):
        shutil.copytree(request.getfixturevalue("finished_run"), tree / folder)
    return tree


@pytest.mark.parametrize("name", pages_with(slow=False))
def test_commands_run_as_written(name: str, tree_of_a_reader: Path) -> None:
    run_in(tree_of_a_reader, [command for command in TO_RUN[name] if not command.is_slow])


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", pages_with(slow=True))
def test_slow_commands_run_as_written(name: str, tree_of_a_reader: Path) -> None:
    """On the run that the README makes, and with the others of their page."""
    first = [] if name == README else [TO_RUN[README][0]]
    run_in(tree_of_a_reader, [*first, *TO_RUN[name]])


def test_there_are_commands() -> None:
    assert len(TO_RUN[README]) >= 2
    assert sum(map(len, TO_RUN.values())) >= 10


@pytest.mark.parametrize("mark", NOT_RUN)
def test_every_exception_is_needed(mark: str) -> None:
    commands = [command for all_ in COMMANDS.values() for command in all_]
    assert any(command.has(mark) for command in commands), f"no command has {mark}: drop it"


def test_every_run_of_a_reader_is_needed() -> None:
    words = {word for all_ in TO_RUN.values() for command in all_ for word in command.words}
    assert set(RUNS_OF_A_READER) <= words


def test_commands_that_are_not_run_name_scripts_and_flags_that_are_there() -> None:
    flags: dict[Path, set[str]] = {}
    for command in (c for all_ in COMMANDS.values() for c in all_ if c.reason is not None):
        scripts = [word for word in command.words if word.endswith((".py", ".sh"))]
        for script in scripts:
            assert (PROJECT_DIR / script).is_file(), str(command)
        given = {word.split("=")[0] for word in command.words if word.startswith("--")}
        if not scripts or not given:
            continue
        # What run_all.sh hands its flags to.
        program = PROJECT_DIR / scripts[-1].replace("./run_all.sh", "tools/run_all.py")
        if program not in flags:
            shown = subprocess.run(
                [sys.executable, str(program), "--help"], capture_output=True, text=True
            )
            assert shown.returncode == 0, shown.stderr
            flags[program] = set(re.findall(r"--\w+", shown.stdout))
        assert given <= flags[program], f"{command} gives {given - flags[program]}"
