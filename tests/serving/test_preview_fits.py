"""Previews' weights: made once for each VAE, found again by other processes."""

from pathlib import Path

import numpy as np
import pytest

from common.runs.generation import write_generation_config
from common.serving.preview_fits import PreviewFits
from common.vae.preview import PICTURES
from tests.configs import make_config
from tests.conftest import DEMO


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "staged-diffusion" / "previews"


def test_they_are_made_once_and_kept(run_dir: Path, own_cache: Path) -> None:
    fits = PreviewFits()
    assert not fits.advance() and fits.weights(run_dir) is None
    assert [fits.advance() for _ in range(PICTURES + 2)] == [True] * (PICTURES + 1) + [False]
    made = fits.weights(run_dir)
    assert made is not None and np.isfinite(made).all()
    other = PreviewFits()  # of another process
    np.testing.assert_array_equal(other.weights(run_dir), made)
    assert not other.advance()
    (kept,) = own_cache.iterdir()
    kept.write_bytes(b"damaged")
    again = PreviewFits()
    assert again.weights(run_dir) is None and again.advance()


def test_where_there_can_be_none_it_is_said_once(
    tmp_path: Path, demo_copy: Path, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fits = PreviewFits()
    assert fits.weights(tmp_path / "gone") is None and not fits.advance()
    run_dir = tmp_path / "run"
    write_generation_config(run_dir, make_config(demo_copy, height=64, width=64))
    assert fits.weights(run_dir) is None
    (weights,) = (demo_copy / "vae").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    assert fits.advance() and not fits.advance() and fits.weights(run_dir) is None
    assert "there are no previews for --model_id" in capsys.readouterr().err
    assert DEMO.is_dir() and not own_cache.exists()
