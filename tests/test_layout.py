"""Where everything lives: every module has its tests at the mirrored place, and stays small."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import PROJECT_DIR

TESTS = PROJECT_DIR / "tests"
# Suites that cut across the packages, and tests of the tree as a whole.
SUITES = ("benchmarks", "e2e", "faults", "fuzz", "gpu", "parity", "sharded", "tpu")
OF_THE_TREE = (
    *("test_layout.py", "test_import_contracts.py"),
    *("test_extending.py", "test_files_page.py"),
)
MOST_LINES = {"common": 400, "stages": 150}
MOST_LINES_OF_A_FUNCTION, MOST_PARAMETERS = 60, 7
# Kernels in the place of torch's own, whose signatures they have.
KERNELS = ("attention", "conv2d")


def modules(package: str) -> list[Path]:
    """A package's modules, relative to the project; an empty `__init__.py` is none."""
    paths = sorted((PROJECT_DIR / package).rglob("*.py"))
    return [
        path.relative_to(PROJECT_DIR)
        for path in paths
        if path.name != "__init__.py" or path.read_text().strip()
    ]


def place_of_tests(module: Path) -> Path:
    """tests/sampling/test_noise.py for common/sampling/noise.py; other folders keep their names."""
    parts = module.parent.parts
    below = parts[1:] if parts[0] == "common" else parts
    return Path("tests", *below, f"test_{module.stem.strip('_')}.py")


def functions(module: Path) -> Iterator[tuple[str, ast.FunctionDef]]:
    """The functions and methods of a module, each with its place in words."""
    for node in ast.walk(ast.parse((PROJECT_DIR / module).read_text(), str(module))):
        if isinstance(node, ast.FunctionDef):
            yield f"{module}:{node.lineno} {node.name}", node


def parameters(function: ast.FunctionDef) -> list[str]:
    """The names of what it takes, without self."""
    taken = function.args
    names = [one.arg for one in (*taken.posonlyargs, *taken.args, *taken.kwonlyargs)]
    return [name for name in names if name not in ("self", "cls")]


def imported(path: Path) -> set[str]:
    """The names of the modules that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names.add(node.module)
    return names


@pytest.mark.parametrize("package", ["common", "stages", "tools"])
def test_every_module_has_a_test_file_of_its_name(package: str) -> None:
    missing = [
        f"{place_of_tests(module)}, of {module}"
        for module in modules(package)
        if not (PROJECT_DIR / place_of_tests(module)).exists()
    ]
    assert not missing, "test files to write: " + "; ".join(missing)


def test_no_test_file_is_left_whose_module_is_gone() -> None:
    """A module's tests may stand in several files, whose names begin with the module's."""
    places = {
        place_of_tests(m) for package in ("common", "stages", "tools") for m in modules(package)
    }
    stems = {path.with_suffix("") for path in places}
    left = []
    for file in sorted(path.relative_to(PROJECT_DIR) for path in TESTS.rglob("test_*.py")):
        if file.parts[1] in (*SUITES, *OF_THE_TREE):
            continue
        words = file.stem.split("_")
        names = ["_".join(words[:count]) for count in range(2, len(words) + 1)]
        if not any(file.parent / name in stems for name in names):
            left.append(str(file))
    assert not left, "no module has these names: " + ", ".join(left)


def test_the_suites_are_there() -> None:
    assert {name for name in SUITES if not (TESTS / name).is_dir()} == set()
    assert {name for name in OF_THE_TREE if not (TESTS / name).is_file()} == set()


@pytest.mark.parametrize("package", MOST_LINES)
def test_modules_are_short(package: str) -> None:
    lengths = {m: len((PROJECT_DIR / m).read_text().splitlines()) for m in modules(package)}
    long = [
        f"{module}: {lines}" for module, lines in lengths.items() if lines > MOST_LINES[package]
    ]
    assert not long, f"more than {MOST_LINES[package]} lines: {', '.join(long)}"


@pytest.mark.parametrize("package", MOST_LINES)
def test_functions_fit_on_a_screen(package: str) -> None:
    long = [
        f"{place}: {lines}"
        for module in modules(package)
        for place, node in functions(module)
        if (lines := (node.end_lineno or 0) - node.lineno + 1) > MOST_LINES_OF_A_FUNCTION
    ]
    assert not long, f"more than {MOST_LINES_OF_A_FUNCTION} lines: {', '.join(long)}"


@pytest.mark.parametrize("package", MOST_LINES)
def test_functions_take_few_parameters(package: str) -> None:
    many = [
        f"{place}: {count}"
        for module in modules(package)
        for place, node in functions(module)
        if (count := len(parameters(node))) > MOST_PARAMETERS
        and not (module.parts[:2] == ("common", "compute") and node.name in KERNELS)
    ]
    assert not many, f"more than {MOST_PARAMETERS} parameters: {', '.join(many)}"


def test_every_kernel_that_is_excepted_needs_it() -> None:
    found = {
        node.name
        for module in modules("common")
        if module.parts[1] == "compute"
        for _, node in functions(module)
        if len(parameters(node)) > MOST_PARAMETERS
    }
    assert set(KERNELS) <= found, f"drop {set(KERNELS) - found} from KERNELS"


@pytest.mark.parametrize("folder", ["common", "stages", "tools", "benchmarks", "tests"])
def test_nobody_imports_the_stages(folder: str) -> None:
    """They are scripts; what others need of them is in common/."""
    importers = [
        str(path.relative_to(PROJECT_DIR))
        for path in sorted((PROJECT_DIR / folder).rglob("*.py"))
        if any(name.split(".")[0] == "stages" for name in imported(path))
    ]
    assert not importers, "these import from stages/: " + ", ".join(importers)
