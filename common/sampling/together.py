"""Runs of one process that wait for each other, to be denoised as one group.

Each run has a thread and a seat. One thread works at a time, whatever the others wait for, so that
nothing else has to know of threads; where all runs have come to their denoising, or will not, those
that the same program serves are denoised by one of their threads.
"""

import itertools
import threading
from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from common.compute.groups import group_size
from common.errors import in_one_line
from common.messages import warn
from common.progress import Shown
from common.sampling.denoiser import Denoiser
from common.sampling.share import Share


@dataclass(frozen=True, kw_only=True)
class DenoisedTogether:
    """What a run gets of a group."""

    latents: np.ndarray  # of its images, [b, C, h, w]
    seconds: float  # of the devices, for one image
    group_size: int  # images at once, the last one's repeated
    others: int  # images of other runs


@dataclass(eq=False)
class _Waiting:
    """A run that has come to its denoising."""

    denoiser: Denoiser
    share: Share
    bar: Shown
    program: Hashable  # all that the group's program is compiled for
    found: DenoisedTogether | None = None
    is_over: bool = False


class Together:
    """Some runs that are done at once."""

    def __init__(self, runs: int) -> None:
        self._changed = threading.Condition()  # its lock is held by the thread that works
        self._coming = runs
        self._waiting: list[_Waiting] = []

    def seats(self) -> "list[Seat]":
        """One for each run."""
        return [Seat(self) for _ in range(self._coming)]

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Within the block this thread works, and no other one but where this one waits."""
        with self._changed:
            yield

    def come_no_more(self) -> None:
        """One run less is waited for."""
        self._coming -= 1
        self._changed.notify_all()

    def denoise(self, denoiser: Denoiser, share: Share, bar: Shown) -> DenoisedTogether | None:
        """Denoise a run's images with those of others; None: it is to do that alone."""
        own = _Waiting(denoiser, share, bar, _program_of(denoiser, share))
        self._waiting.append(own)
        self.come_no_more()
        while not own.is_over:
            if self._coming > 0:
                self._changed.wait()
                continue
            group = [each for each in self._waiting if each.program == own.program]
            try:
                _denoise(group)
            finally:  # whatever ends this run, the others go on
                self._waiting = [each for each in self._waiting if each not in group]
                self._changed.notify_all()
        return own.found


class Seat:
    """A run's place among those that are done at once."""

    def __init__(self, together: Together) -> None:
        self._together, self._comes = together, True

    @contextmanager
    def turn(self) -> Iterator[None]:
        """The block is the run, in a thread of its own."""
        with self._together.turn():
            try:
                yield
            finally:
                if self._comes:  # it was fresh, or failed
                    self._comes = False
                    self._together.come_no_more()

    def denoise(self, denoiser: Denoiser, share: Share, bar: Shown) -> DenoisedTogether | None:
        """As `Together.denoise`; once for each run."""
        if not self._comes or not denoiser.takes_several or not _has_one_program(share):
            return None
        self._comes = False
        return self._together.denoise(denoiser, share, bar)


def _has_one_program(share: Share) -> bool:
    """Whether all of a run's steps are by the same program, and its scheduler is a table."""
    if share.tables is None:
        return False
    steps = range(share.tables.evaluations)
    guidance = share.job.guidance
    return len({guidance.predictions(i, share.tables.evaluations) for i in steps}) == 1


def _program_of(denoiser: Denoiser, share: Share) -> Hashable:
    """What has to be the same of runs in one group."""
    job, tables = share.job, share.tables
    assert tables is not None
    predictions = job.guidance.predictions(0, tables.evaluations)
    told = share.told(predictions, denoiser.dtype)
    rows = tuple((name, tensor.shape[1:], str(tensor.dtype)) for name, tensor in told.items())
    conditions = tuple(condition.compiled_in() for condition in job.conditions)
    return (
        *(denoiser.compiled_for(), job.latent_shape, tables.coefficients.shape),
        *(type(job.guidance), predictions, conditions, rows),
    )


class _Looks:
    """Tells each run how far it is; one after the other gets a look at its images."""

    def __init__(self, bars: Sequence[Shown]) -> None:
        self._bars, self._turns = bars, itertools.cycle(range(len(bars)))
        self._asked: deque[int | None] = deque()  # for each range: whose look it is
        self.are_wanted = any(bar.watcher is not None for bar in bars)

    def wants_look(self) -> bool:
        """Whether it is time for the next one's look."""
        number = next(self._turns)
        watcher = self._bars[number].watcher
        wanted = watcher is not None and watcher.wants_look()
        self._asked.append(number if wanted else None)
        return wanted

    def tell(self, denoiser: Denoiser) -> None:
        """A range of steps is done."""
        looked_at = self._asked.popleft() if self._asked else None
        for number, bar in enumerate(self._bars):
            more = min(denoiser.done, bar.total) - bar.done
            if more > 0:
                look = partial(denoiser.look, number) if number == looked_at else None
                bar.update(more, look)


def _denoise(group: list[_Waiting]) -> None:
    """Denoise the images of some runs; where that fails, each is to do it alone."""
    try:
        if len(group) > 1:
            _denoise_as_one(group)
    except Exception as error:  # of memory, say; what is wrong with one of them it will say itself
        warn(f"{len(group)} runs are denoised one by one ({in_one_line(error)})")
        for each in group:
            each.found = None
    finally:
        for each in group:
            each.is_over = True


def _denoise_as_one(group: list[_Waiting]) -> None:
    denoiser, shares = group[0].denoiser, [each.share for each in group]
    counts = [len(share.chosen) for share in shares]
    images = sum(counts)
    # Few sizes: each is another program.
    size = group_size(1 << (images - 1).bit_length(), denoiser.devices_of_images)
    last = shares[-1].chosen
    filled = np.concatenate([last, np.repeat(last[-1:], size - images)])
    shares[-1] = replace(shares[-1], chosen=filled)
    before = denoiser.report.parts().get("run", 0.0)
    denoiser.start(*shares)
    denoiser.compile()
    looks = _Looks([each.bar for each in group])
    for _ in denoiser.run(wants_look=looks.wants_look if looks.are_wanted else None):
        looks.tell(denoiser)
    latents = denoiser.latents()  # [size, C, h, w]
    seconds = (denoiser.report.parts().get("run", 0.0) - before) / images
    begins = np.cumsum([0, *counts])
    for each, begin, count in zip(group, begins, counts, strict=False):
        each.found = DenoisedTogether(
            latents=latents[begin : begin + count].copy(),
            seconds=round(seconds, 4),
            group_size=size,
            others=images - count,
        )
