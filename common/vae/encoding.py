"""Encoding all of a run's pictures, in groups of one shape."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.compute.groups import groups
from common.compute.options import RunOptions
from common.errors import NotFiniteError
from common.files.kept_progress import Progress
from common.messages import progress_bar
from common.stopping import StopRequest
from common.vae.encoder import Posterior

if TYPE_CHECKING:
    from common.files.report import Profile
    from common.vae.encoder import Encoder


def encode_parts(
    encoder: "Encoder",
    parts: Mapping[str, np.ndarray],
    options: RunOptions,
    *,
    progress: Progress | None = None,
    stop: StopRequest | None = None,
) -> dict[str, Posterior]:
    """Encode some sets of pictures [I, 3, H, W] as one, as `encode_groups` does."""
    found = encode_groups(
        encoder, np.concatenate([*parts.values()]), options, progress=progress, stop=stop
    )
    encoded, first = {}, 0
    for name, pictures in parts.items():
        rows = slice(first, first + len(pictures))
        encoded[name] = Posterior(mean=found.mean[rows], std=found.std[rows])
        first = rows.stop
    return encoded


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
    import torch

    size = encoder.runner.group_size(len(pictures), options)
    several = len(pictures) > size
    means, deviations = [], []
    with progress_bar(len(pictures), "encode", "picture") as shown:
        for number, (chosen, real) in enumerate(groups(len(pictures), size)):
            finished = progress.read_group(number) if progress is not None else None
            if finished is not None:
                mean, std = finished["mean"].numpy(), finished["std"].numpy()
            else:
                found = encoder.encode(pictures[chosen], warm_up=options.warmup)
                mean, std = found.mean[:real], found.std[:real]
                _refuse_infinities(mean, std, str(encoder.runner.dtype))
                if progress is not None and several:
                    kept = {"mean": torch.from_numpy(mean), "std": torch.from_numpy(std)}
                    progress.save_group(number, kept)
            means.append(mean)
            deviations.append(std)
            shown.update(real)
            if stop is not None and several and finished is None:
                done = sum(map(len, means))
                stop.raise_if_asked(
                    f"after {done} of {len(pictures)} pictures, which are kept: the same command "
                    "goes on from there"
                )
    return Posterior(mean=np.concatenate(means), std=np.concatenate(deviations))


def measure(
    encoder: "Encoder", parts: Mapping[str, np.ndarray], options: RunOptions, profile_folder: Path
) -> "Profile | None":
    """Encode the first group again, as often as `--repeat` and `--profile` ask for."""
    pictures = np.concatenate([*parts.values()])
    size = encoder.runner.group_size(len(pictures), options)
    first = pictures[next(groups(len(pictures), size))[0]]
    return encoder.runner.measure(lambda: encoder.encode(first), options, profile_folder)


def _refuse_infinities(mean: np.ndarray, std: np.ndarray, dtype: str) -> None:
    if not (np.isfinite(mean).all() and np.isfinite(std).all()):
        raise NotFiniteError(
            f"the VAE in {dtype.removeprefix('torch.')} gave values that are not finite, so no "
            "latents were written: use --vae_dtype float32"
        )
