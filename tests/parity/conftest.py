"""The parity table, written to the file that PARITY_TABLE names when all tests have run."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.parity.parity_table import ParityTable


@pytest.fixture(scope="session")
def parity_table() -> Iterator[ParityTable]:
    table = ParityTable()
    yield table
    if "PARITY_TABLE" in os.environ:
        table.write(Path(os.environ["PARITY_TABLE"]))
