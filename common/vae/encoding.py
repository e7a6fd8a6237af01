"""Encoding all of a run's pictures, in groups of one shape."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.compute.options import RunOptions
from common.files.kept_progress import Progress
from common.progress import progress_bar
from common.stopping import StopRequest
from common.vae.encoder import Posterior

if TYPE_CHECKING:
    from common.files.report import Profile
    from common.vae.encoder import Encoder


def encode_groups(
    encoder: "Encoder",
    pictures: np.ndarray,
    options: RunOptions,
    *,
    progress: Progress | None = None,
    stop: StopRequest | None = None,
) -> Posterior:
    """Encode pictures [B, 3, H, W] float32 in groups of one shape.

    Args:
        progress: where each group's posteriors are kept until all are done, if there are several.
        stop: asked after each group.

    Raises:
        NotFiniteError: the VAE gave infinities or not-a-numbers.
        StoppedError: a stop was asked for; what is done is kept.
    """
    runner = encoder.runner

    def encode(chosen: np.ndarray) -> dict[str, np.ndarray]:
        found = encoder.encode(chosen, warm_up=options.warmup)
        finite = bool(np.isfinite(found.mean).all() and np.isfinite(found.std).all())
        runner.refuse_infinities(finite, "latents were")
        return {"mean": found.mean, "std": found.std}

    bar = progress_bar(len(pictures), "encode", "picture")
    found = runner.in_groups(
        pictures, encode, options, bar=bar, units="pictures", progress=progress, stop=stop
    )
    return Posterior(**found)


def split_by_parts(found: Posterior, counts: Mapping[str, int]) -> dict[str, Posterior]:
    """The posteriors of sets of pictures that were encoded as one, by the sets' names.

    Args:
        counts: how many pictures each set has, in their order.
    """
    encoded, first = {}, 0
    for name, count in counts.items():
        rows = slice(first, first + count)
        encoded[name] = Posterior(mean=found.mean[rows], std=found.std[rows])
        first = rows.stop
    return encoded


def measure(
    encoder: "Encoder", pictures: np.ndarray, options: RunOptions, profile_folder: Path
) -> "Profile | None":
    """Encode the first group again, as often as `--repeat` and `--profile` ask for."""
    first = encoder.runner.first_group(pictures, options)
    return encoder.runner.measure(lambda: encoder.encode(first), options, profile_folder)
