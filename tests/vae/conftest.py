"""A tiny VAE that no test changes."""

import pytest

from common.models.checkpoint import Checkpoint
from tests.vae.tiny_vae import save_vae


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return save_vae(tmp_path_factory.mktemp("tiny_vae"))
