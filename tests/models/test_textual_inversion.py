"""Textual inversions count by token and content; tests/parity has what they teach."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from common.models.model_settings import TokenFile
from common.models.textual_inversion import embedding_settings


def test_a_textual_inversion_counts_by_token_and_content(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({"emb": torch.ones(1, 4)}, tmp_path / f"{name}.safetensors")
    first, second = (
        embedding_settings([TokenFile(file=str(tmp_path / f"{name}.safetensors"), token="x")])
        for name in ("a", "b")
    )
    assert first == second and first[0]["token"] == "x"
