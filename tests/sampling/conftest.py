"""A tiny UNet that no test changes."""

import pytest

from common.models.checkpoint import Checkpoint
from tests.sampling.tiny_unet import save_unet


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return save_unet(tmp_path_factory.mktemp("tiny_unet"))
