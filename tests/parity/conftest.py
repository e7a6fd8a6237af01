"""The parity table, and a compile cache for the session.

The table is written to the file that PARITY_TABLE names when all tests have run. The cache saves
compiling the tiny checkpoints' programs, which many tests share; their weights are arguments.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from tests.parity.parity_table import ParityTable

# One scheduler of each kind. All of them are tried with texts alone; what else there is, is other
# data of the same programs.
SOME = ("euler", "euler_a", "ddim", "pndm", "lms", "heun", "dpmpp_2m", "dpmpp_sde", "unipc", "lcm")
FEW = ("euler", "ddim", "heun", "dpmpp_sde")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the combinations of schedulers with all else that CI has no time for as `long`."""
    for item in items:
        call = getattr(item, "callspec", None)
        is_ours = call is not None and Path(__file__).parent in item.path.parents
        is_slow = is_ours and "scheduler" in call.params and item.get_closest_marker("slow")
        if is_slow or (is_ours and is_long(item.name, call.params)):
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.long)


def is_long(test: str, params: Mapping[str, Any]) -> bool:
    """Whether a test with these parameters is of the matrix that `make parity` runs."""
    scheduler, strength = params.get("scheduler"), params.get("strength", 0.5)
    is_sd = "SD" in str(params.get("family", params.get("way"))).replace("SDXL", "")
    if scheduler is None:
        return False
    if test.startswith("test_every_scheduler") and params.keys() <= TEXTS:
        return is_sd and scheduler not in FEW
    if test.startswith("test_every_variation"):
        return is_sd or scheduler not in FEW
    if is_sd or strength != 0.5 or test.startswith("test_what_a_cut"):
        return scheduler not in FEW[: 2 if is_sd else 4] or (is_sd and strength not in (0.5, 1.0))
    return scheduler not in SOME


TEXTS = {"family", "scheduler"}  # the parameters of a text's


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
