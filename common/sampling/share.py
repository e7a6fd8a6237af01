"""What a group of images has of one run: most groups are of one run alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from common.conditions.prepare import prepare_conditions
from common.sampling.job import DenoisingJob
from common.sampling.noise import Drawn, KeptArea, draw_all_noises, draw_first
from common.sampling.scheduler_tables import SchedulerTables, stacked

if TYPE_CHECKING:
    from common.conditions.base import ImagesOfGroup

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Share:
    """Some images of a run, which are denoised by its scheduler and guidance."""

    job: DenoisingJob
    chosen: np.ndarray  # the images, by their indices [b]
    tables: SchedulerTables | None  # the sampler's; None steps the sampler itself on the host

    @property
    def seeds(self) -> list[int]:
        """The images' own, [b]."""
        return [self.job.seeds[index] for index in self.chosen]

    def draw(self) -> Drawn:
        """What the images' generators draw first, anew each time."""
        job = self.job
        return draw_first(
            job.begin, self.chosen.tolist(), self.seeds, job.sampler, job.latent_shape
        )

    @cached_property
    def drawn(self) -> Drawn:
        """The same, once."""
        return self.draw()

    def kept_area(self) -> KeptArea:
        """What stays of the images."""
        masks = self.job.begin.masks if self.job.keeps_area else None
        return KeptArea.of(None if masks is None else masks[self.chosen], self.drawn.first)

    def noises(self) -> np.ndarray:
        """Those that the scheduler draws, [S, b, C, h, w]."""
        assert self.tables is not None
        return draw_all_noises(self.drawn, self.seeds, self.job.sampler, self.tables)

    def told(self, predictions: Sequence[str], dtype: torch.dtype) -> Tensors:
        """What the UNet is told of the images for some predictions, [N, …]."""
        return prepare_conditions(self.job.conditions, self._images(dtype), predictions)

    def _images(self, dtype: torch.dtype) -> "ImagesOfGroup":
        return self.job.images(self.chosen, dtype, self.drawn.first)


def guidance_weights(shares: Sequence[Share]) -> dict[str, np.ndarray]:
    """As `Guidance.weights`; of several shares each image's own, [B, 1, 1, 1]."""
    if len(shares) == 1:
        return shares[0].job.guidance.weights()
    rows = [share.job.guidance.weights() for share in shares for _ in share.chosen]
    return {name: np.stack([row[name] for row in rows])[:, None, None, None] for name in rows[0]}


def kept_areas(shares: Sequence[Share]) -> KeptArea:
    """What stays of all images of a group."""
    each = [share.kept_area().arrays() for share in shares]
    return KeptArea(**{name: np.concatenate([own[name] for own in each]) for name in each[0]})


def tables_of_images(shares: Sequence[Share]) -> SchedulerTables:
    """The schedulers' tables, each image's own."""
    tables = [share.tables for share in shares for _ in share.chosen]
    return stacked([each for each in tables if each is not None])


def told_of(shares: Sequence[Share], predictions: Sequence[str], dtype: torch.dtype) -> Tensors:
    """What the UNet is told of all images of a group, [N, …]."""
    each = [share.told(predictions, dtype) for share in shares]
    return {name: torch.cat([own[name] for own in each]) for name in each[0]}
