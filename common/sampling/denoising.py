"""All images of a run, denoised in groups of one shape."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.compute.groups import group_size, groups
from common.compute.options import RunOptions
from common.compute.profile_tables import Profiler
from common.files.kept_progress import Progress
from common.files.report import Profile
from common.files.rows import Rows
from common.messages import say, warn
from common.progress import progress_bar
from common.sampling.denoiser import Denoiser
from common.sampling.group_progress import GroupProgress
from common.sampling.job import DenoisingJob
from common.sampling.scheduler_tables import NotLinearError, SchedulerTables, make_tables
from common.stopping import StopRequest


@dataclass(frozen=True, kw_only=True)
class Denoised:
    """What stage 2 computes."""

    latents: torch.Tensor  # [B, C, h, w] float32
    seconds: list[float | None]  # of devices, for each image [B]; None where that is not known
    kept_after: list[int]  # numbers of steps
    trajectory: torch.Tensor | None  # the latents after each of them [S, B, C, h, w]
    trajectory_every: int | None  # how many steps these are apart
    profile: Profile | None  # of the first group


def denoise_images(
    denoiser: Denoiser,
    job: DenoisingJob,
    options: RunOptions,
    rows: Rows | None = None,
    *,
    profile_folder: Path | None = None,
    progress: Progress | None = None,
    stop: StopRequest | None = None,
) -> Denoised:
    """Denoise all images, in groups of one shape.

    Args:
        rows: those that an earlier file has are taken from there.
        profile_folder: for a profile of the first group.
        progress: what a stopped run left, to go on from, and where this one leaves its own.
        stop: asked after each range of steps.

    Raises:
        StoppedError: a stop was asked for; what is done is kept.
    """
    tables = tables_of(denoiser, job, options)
    run = _Run(denoiser, job, options, tables, profile_folder)
    todo = run.take(rows)
    with progress_bar(
        run.bar_steps(len(todo)), "denoise", "step", images=len(todo), leave=True
    ) as bar:
        for number, (places, real) in enumerate(groups(len(todo), run.group_size)):
            group = GroupProgress(progress, stop, options.checkpoint_every, number, bar)
            chosen = todo[places]
            own = chosen[:real]
            finished = group.finished()
            if finished is not None:
                run.latents[own] = finished["latents"].numpy()
                run.trajectory[:, own] = finished["trajectory"].numpy()
                run.count(own, float(finished["seconds"]))
                bar.skip(run.evaluations)
                continue
            if job.prompts:
                bar.note(job.prompts[int(job.prompt_of[own[0]])])
            seconds = run.denoise_group(chosen, group) / real
            run.count(own, seconds)
            made = denoiser.latents()
            kept = np.reshape(denoiser.trajectory, (-1, *made.shape))[:, :real]
            run.latents[own], run.trajectory[:, own] = made[:real], kept
            if len(todo) > run.group_size:
                arrays = {"latents": made[:real], "trajectory": kept}
                group.keep_finished({**arrays, "seconds": np.array(seconds)})
            run.measure_first()
    return run.denoised()


def taken_images(rows: Rows) -> Denoised:
    """What stage 2 gives where an earlier file has all of it."""
    latents = rows.read(range(len(rows.recipes)))["latents"]
    return Denoised(
        latents=latents,
        seconds=[rows.seconds(row) for row in range(len(latents))],
        kept_after=[],
        trajectory=None,
        trajectory_every=None,
        profile=None,
    )


def tables_of(denoiser: Denoiser, job: DenoisingJob, options: RunOptions) -> SchedulerTables | None:
    """The scheduler as data, probed on the CPU; None where it has to step on the host."""
    with denoiser.report.part("scheduler_tables"):
        try:
            return make_tables(job.sampler, keeps_area=job.keeps_area, soft_masks=job.soft_masks)
        except NotLinearError as reason:
            name = job.sampler.name
            say(f"  {name} steps on the host between model evaluations ({reason})")
            if options.checkpoint_every is not None:
                warn(f"--checkpoint_every has no effect: {name} steps on the host")
            return None


class _Run:
    """What is collected from group to group."""

    def __init__(
        self,
        denoiser: Denoiser,
        job: DenoisingJob,
        options: RunOptions,
        tables: SchedulerTables | None,
        profile_folder: Path | None,
    ) -> None:
        self.denoiser, self.job, self.options, self.tables = denoiser, job, options, tables
        count = len(job.seeds)
        self.group_size = group_size(count, options.batch_size, denoiser.devices_of_images)
        self.evaluations = len(job.sampler.restart())
        self.kept_after = steps_to_keep(self.evaluations, options.save_trajectory)
        self.seconds: list[float | None] = [None] * count
        self.latents = np.empty((count, *job.latent_shape), np.float32)
        self.trajectory = np.empty((len(self.kept_after), *self.latents.shape), np.float32)
        self.is_first = True
        self.profile: Profile | None = None
        self.profiler: Profiler | None = None
        if profile_folder is not None:
            steps = options.profiled_steps(self.evaluations)
            self.profiler = denoiser.profiler(profile_folder, steps)

    def take(self, rows: Rows | None) -> np.ndarray:
        """Take the latents that an earlier file has. Returns the indices of the other images."""
        if rows is None:
            return np.arange(len(self.job.seeds))
        taken = sorted(rows.places)
        if taken:
            self.latents[taken] = rows.read(taken)["latents"].numpy()
        for row in taken:
            self.seconds[row] = rows.seconds(row)
        return np.array(rows.missing)

    def bar_steps(self, images: int) -> int:
        """The steps of all groups of so many images."""
        return -(-images // self.group_size) * self.evaluations

    def count(self, images: np.ndarray, seconds: float) -> None:
        """Note how long each of some images took."""
        for image in images.tolist():
            self.seconds[image] = round(seconds, 4)

    def denoise_group(self, chosen: np.ndarray, group: GroupProgress) -> float:
        """All steps of some images, or those that an earlier run has not kept.

        Returns the seconds that the devices took for all steps.
        """
        self.denoiser.start(self.job, chosen, self.tables)
        if self.is_first and (said := self.denoiser.unguided_in_words()):
            say(f"  steps without guidance: {said}")
        self.denoiser.compile()
        self.denoiser.warm_up(self.options.warmup_steps if self.is_first else 0)
        group.resume(self.denoiser)
        group.bar.unpause()
        report, kept = self.denoiser.report, self.denoiser.done
        before = report.parts().get("run", 0.0)
        for _ in self._steps(group):
            group.after_a_range(self.denoiser)
        made = self.evaluations - kept
        return (report.parts().get("run", 0.0) - before) * self.evaluations / max(made, 1)

    def _steps(self, group: GroupProgress) -> Iterator[Any]:
        return self.denoiser.run(
            keep_after=self.kept_after,
            pause_after=group.pause_after(self.evaluations),
            pause=group.wants_pause,
            profiler=self.profiler if self.is_first else None,
        )

    def measure_first(self) -> None:
        """What is measured of the first group alone."""
        if self.is_first:
            self.denoiser.repeat(self.options.repeat)
            self.profile = self.profiler.result() if self.profiler is not None else None
        self.is_first = False

    def denoised(self) -> Denoised:
        """All that was made."""
        return Denoised(
            latents=torch.from_numpy(self.latents),
            seconds=self.seconds,
            kept_after=self.kept_after,
            trajectory=torch.from_numpy(self.trajectory) if self.kept_after else None,
            trajectory_every=self.options.save_trajectory,
            profile=self.profile,
        )


def steps_to_keep(evaluations: int, every: int | None) -> list[int]:
    """The numbers of steps after which a trajectory has latents; the last is always among them."""
    if every is None:
        return []
    return sorted({*range(every, evaluations + 1, every), evaluations})
