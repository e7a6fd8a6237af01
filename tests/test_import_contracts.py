"""The contracts of imports in pyproject.toml hold, and each is broken by what it forbids."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.conftest import PROJECT_DIR

LINT_IMPORTS = Path(sys.executable).parent / "lint-imports"
# Contract → a module, and the line that breaks the contract there.
BREAKS = {
    "layers": ("common/files/run_files.py", "import common.runs.flags"),
    "no_cycles": ("common/compute/groups.py", "import common.compute.programs"),
    "stage_1_without_jax": ("common/conditions/encoding.py", "import jax"),
    "stages_2_and_3_without_text_encoders": ("common/vae/loading.py", "import transformers"),
    "one_user_of_torchax": ("common/compute/devices.py", "import torchax"),
    "one_user_of_the_tpu_compiler": (
        "common/runs/in_turn.py",
        "from common.compute import tpu_compiler",
    ),
    "nobody_imports_stages": ("tools/run_all.py", "import stages.stage2_unet"),
}
# The other half of a circle.
FURTHER = {"no_cycles": ("common/compute/programs.py", "import common.compute.groups")}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the code."""
    for name in ("common", "stages", "tools"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(PROJECT_DIR / name, tmp_path / name, ignore=ignored)
    shutil.copy(PROJECT_DIR / "pyproject.toml", tmp_path)
    return tmp_path


def lint(tree: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [str(LINT_IMPORTS), "--no-cache", *arguments]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True)


def test_every_contract_is_broken_by_one_of_these() -> None:
    settings = tomllib.loads((PROJECT_DIR / "pyproject.toml").read_text())
    contracts = settings["tool"]["importlinter"]["contracts"]
    assert [contract["id"] for contract in contracts] == list(BREAKS)


def test_all_contracts_hold(tree: Path) -> None:
    result = lint(tree)
    assert result.returncode == 0, result.stdout
    assert f"{len(BREAKS)} kept, 0 broken" in result.stdout


@pytest.mark.parametrize("contract", BREAKS)
def test_a_contract_is_broken_on_purpose(contract: str, tree: Path) -> None:
    for module, line in (BREAKS[contract], *([FURTHER[contract]] if contract in FURTHER else [])):
        with (tree / module).open("a") as file:
            file.write(f"\n{line}\n")
    result = lint(tree, "--contract", contract)
    assert result.returncode == 1, result.stdout
    assert "0 kept, 1 broken" in result.stdout
