"""Some damaged and hostile files; `make fuzz` draws thousands."""

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from tests.fuzz.fuzz import (
    CODES,
    TARGETS,
    Case,
    Folders,
    Found,
    fuzz_here,
    fuzz_processes,
    models_out_of_reach,
    run_here,
    what_is_wrong,
)

pytestmark = pytest.mark.slow
REGRESSIONS = sorted((Path(__file__).parent / "regressions").iterdir())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Folders]:
    before = jax.config.jax_compilation_cache_dir
    yield Folders(tmp_path_factory.mktemp("fuzz"))
    jax.config.update("jax_compilation_cache_dir", before)


def test_undamaged_files_are_accepted(folders: Folders) -> None:
    """What is drawn differs from a run that would go on to its models."""
    with models_out_of_reach():
        for target, content in folders.good().items():
            for stage in TARGETS[target]:
                ended = run_here(folders, Case(stage, target, content))
                assert ended.code == 0, (stage, target, ended.said)


def test_every_case_ends_with_a_sentence_and_its_code(folders: Folders, tmp_path: Path) -> None:
    found = Found(tmp_path)
    fuzz_here(folders, 20, 0, found)
    fuzz_processes([folders], 1, 0, found)
    assert not found.wrong
    assert sum(found.codes.values()) == 21 and found.codes.keys() <= set(CODES)


@pytest.mark.parametrize("path", REGRESSIONS, ids=lambda path: path.name)
def test_what_was_found_once_stays_mended(folders: Folders, path: Path) -> None:
    case, code = Case.of_file(path)
    with models_out_of_reach():
        ended = run_here(folders, case)
    assert what_is_wrong(ended) is None
    assert ended.code == code, ended.said
