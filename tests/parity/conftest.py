"""The parity table, and a compile cache for the session.

The table is written to the file that PARITY_TABLE names when all tests have run. The cache saves
compiling the tiny checkpoints' programs, which many tests share; their weights are arguments.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from tests.parity.parity_table import ParityTable

# One scheduler of each kind. All of them are tried with texts alone; what else there is, is other
# data of the same programs.
SOME = ("euler", "euler_a", "ddim", "pndm", "lms", "heun", "dpmpp_2m", "dpmpp_sde", "unipc", "lcm")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as `long` the combinations of schedulers with all else that CI has no time for."""
    for item in items:
        call = getattr(item, "callspec", None)
        if call is None or Path(__file__).parent not in item.path.parents:
            continue
        scheduler, has_strength = call.params.get("scheduler"), "strength" in call.params
        is_slow = item.get_closest_marker("slow") is not None
        if scheduler is not None and (is_slow or (has_strength and scheduler not in SOME)):
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.long)


@pytest.fixture(scope="session")
def parity_table() -> Iterator[ParityTable]:
    table = ParityTable()
    yield table
    if "PARITY_TABLE" in os.environ:
        table.write(Path(os.environ["PARITY_TABLE"]))


@pytest.fixture(scope="session", autouse=True)
def compile_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


@pytest.fixture
def no_compile_cache(compile_cache: None) -> Iterator[None]:
    """Everything is compiled as on the first day."""
    folder = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", folder)
