"""Previews' weights for the VAEs of jobs: made once for each, kept in the user's cache folder."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common import private_cache
from common.errors import StageError
from common.files.stage_table import LAST
from common.messages import warn
from common.models.checkpoint import Checkpoint
from common.models.component_table import loaded_for
from common.models.find import open_checkpoint
from common.models.weights import load_model, refuse_decoder_alone, with_weights
from common.runs.generation import read_generation_config
from common.whole_files import replace_whole

if TYPE_CHECKING:
    from common.vae.preview import PreviewFit

CACHE_FOLDER = "previews"
NAMES_A_VAE = ("model_id", "revision", "variant", "single_file_config", "vae")  # settings


class PreviewFits:
    """A process's weights by the settings that name a VAE.

    They are made when nothing else is to be done: a second VAE beside a job would slow it down,
    and libraries load models one at a time. The first job of a VAE has no previews.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[Any, ...], np.ndarray | None] = {}
        self._to_fit: dict[tuple[Any, ...], Checkpoint] = {}
        self._fit: PreviewFit | None = None  # that of the first of them

    def weights(self, run_dir: Path) -> np.ndarray | None:
        """Those for a run; None where they are not made yet, or cannot be."""
        try:
            config = read_generation_config(run_dir)
            key = tuple(getattr(config, name) for name in NAMES_A_VAE)
            if key not in self._found:
                checkpoint = open_checkpoint(config, loaded_for(LAST.makes))
                self._found[key] = _read(_cache_file(checkpoint))
                if self._found[key] is None:
                    self._to_fit[key] = checkpoint
        except StageError:  # the stage will say it
            return None
        return self._found[key]

    def advance(self) -> bool:
        """Do a part of what is missing. Returns whether anything was."""
        for key, checkpoint in self._to_fit.items():
            try:
                self._fit = self._fit or _begin(checkpoint)
                found = self._fit.advance()
            except Exception as error:  # previews are worth no process
                warn(f"there are no previews for {checkpoint.source('vae').said}: {error}")
                found, is_done = None, True
            else:
                is_done = found is not None
            if found is not None:
                self._found[key] = found
                _write(_cache_file(checkpoint), found)
            if is_done:
                self._fit = None
                del self._to_fit[key]
            return True
        return False


def _begin(checkpoint: Checkpoint) -> "PreviewFit":
    import torch

    from common.vae.preview import PreviewFit

    refuse_decoder_alone(checkpoint)
    vae = with_weights(*load_model(checkpoint, "vae", torch.float32))
    return PreviewFit(vae, checkpoint.vae_scale_factor)


def _cache_file(checkpoint: Checkpoint) -> Path:
    """Where a VAE's weights of previews stand, by its content and the code that makes them."""
    code = Path(__file__).parents[1] / "vae" / "preview.py"
    of_code = hashlib.sha256(code.read_bytes()).hexdigest()
    name = f"{checkpoint.weights_fingerprint('vae')[:32]}_{of_code[:8]}.npy"
    return private_cache.folder() / CACHE_FOLDER / name


def _read(path: Path) -> np.ndarray | None:
    try:
        found: np.ndarray = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.ndim == 2 and found.shape[1] == 3 else None


def _write(path: Path, weights: np.ndarray) -> None:
    """Keep them; where the folder cannot be written the next process makes them again."""
    try:
        with replace_whole(path) as temporary, temporary.open("wb") as file:
            np.save(file, weights)
    except StageError as error:
        warn(str(error))
