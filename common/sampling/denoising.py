"""All images of a run, denoised in groups; those of one size of pictures have one shape."""

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.compute.groups import group_size
from common.compute.options import RunOptions
from common.compute.profile_tables import Profiler
from common.files.kept_progress import Making
from common.files.made_rows import MadeRows
from common.files.report import Profile
from common.messages import say, warn
from common.progress import progress_bar
from common.sampling.denoiser import Denoiser
from common.sampling.group_progress import GroupProgress
from common.sampling.job import DenoisingJob
from common.sampling.scheduler_tables import NotLinearError, SchedulerTables, make_tables
from common.sampling.share import Share
from common.sampling.together import Seat
from common.stopping import StopRequest

LATENTS, TRAJECTORY = "latents", "trajectory"  # of an image [C, h, w]; [S, C, h, w] float32


@dataclass(frozen=True, kw_only=True)
class Denoised:
    """What stage 2 computes."""

    made: MadeRows  # each image's latents and trajectory
    kept_after: list[int]  # numbers of steps, of a trajectory
    trajectory_every: int | None  # how many steps these are apart
    profile: Profile | None  # of the first group
    images_of_others: int = 0  # of other runs, in the same group

    @property
    def latents(self) -> torch.Tensor:
        """All latents [B, C, h, w]."""
        return self.made.read(range(self.made.count), LATENTS)

    @property
    def trajectory(self) -> torch.Tensor | None:
        """The latents after each of some steps [S, B, C, h, w], where they are kept."""
        if not self.kept_after:
            return None
        return self.made.read(range(self.made.count), TRAJECTORY).transpose(0, 1)


def denoise_images(
    denoiser_of: Callable[[DenoisingJob], Denoiser],
    jobs: Sequence[DenoisingJob],
    options: RunOptions,
    made: MadeRows,
    seat: Seat | None = None,
    *,
    profile_folder: Path | None = None,
    stop: StopRequest | None = None,
) -> Denoised:
    """Denoise all images that are missing, in groups.

    Args:
        denoiser_of: opens a denoiser for a job, after which one of another job has served.
        jobs: one, or several of which each has some of the images.
        made: the run's images; what is denoised goes there.
        seat: of a run that may be denoised with others of its process.
        profile_folder: for a profile of the first group.
        stop: asked after each range of steps.

    Raises:
        StoppedError: a stop was asked for; what is done is kept.
    """
    missing = {*made.missing}
    images = made.kept + len(missing)
    if made.kept:
        say(f"  goes on after {made.kept} of {images} images, which are kept")
    todo = [job for job in jobs if not missing.isdisjoint(job.own)] or jobs[:1]
    sizes = _group_sizes(jobs, options, denoiser_of(todo[0]).devices_of_images)
    plans = [_GroupsOf(job, missing, sizes[job.latent_shape]) for job in todo]
    keep = len(plans) > 1 or images > plans[0].size  # there are several groups
    if seat is not None and not keep:
        others = _with_others(seat, denoiser_of(todo[0]), plans[0], options, made)
        if others is not None:
            return replace(taken_images(made), images_of_others=others)
    waiting, profile = sum(plan.steps for plan in plans), None
    with progress_bar(waiting, "denoise", "step", images=len(missing), leave=True) as bar:
        for number, plan in enumerate(plans):
            run = _Run(denoiser_of(plan.job), plan, options, is_first=number == 0)
            if profile_folder is not None and run.is_first:
                run.profile_to(profile_folder)
            for own in plan.groups:
                # Steps go on in a group of the same shape alone.
                key = [*made.group(own), f"{plan.size} at once"]
                group = GroupProgress(made.progress, stop, options.checkpoint_every, key, bar)
                if plan.job.prompts:
                    bar.note(plan.job.prompts[int(plan.job.prompt_of[own[0]])])
                making = Making(run.denoise_group(own, group), run.made_by)
                made.put(own, run.tensors_of(len(own)), making, keep=keep)
                run.measure_first()
            profile = profile or run.profile
            del run  # the next one's denoiser may need the memory of this one's
    return Denoised(
        made=made,
        kept_after=steps_to_keep(plans[0].evaluations, options.save_trajectory),
        trajectory_every=options.save_trajectory,
        profile=profile,
    )


def _group_sizes(
    jobs: Sequence[DenoisingJob], options: RunOptions, devices: int
) -> dict[tuple[int, ...], int]:
    """Images of a group by their latents' shape: one program serves all jobs of that shape."""
    most: dict[tuple[int, ...], int] = {}
    for job in jobs:
        most[job.latent_shape] = max(most.get(job.latent_shape, 0), len(job.own))
    return {shape: group_size(options.at_once(n), devices) for shape, n in most.items()}


def _with_others(
    seat: Seat, denoiser: Denoiser, plan: "_GroupsOf", options: RunOptions, made: MadeRows
) -> int | None:
    """Denoise a run's one group with those of other runs.

    Returns how many images these have; None where it is to be done alone.
    """
    measured = options.why_measure() is not None or options.save_trajectory is not None
    if measured or len(plan.groups) != 1:
        return None
    (own,) = plan.groups
    tables = tables_of(denoiser, plan.job, options)
    share = Share(plan.job, np.array(own), tables)
    bar = progress_bar(plan.steps, "denoise", "step", images=len(own))
    with denoiser.report.part("run"), bar:
        found = seat.denoise(denoiser, share, bar)
    if found is None:
        return None
    making = Making(found.seconds, options.made_by(denoiser.facts(), found.group_size))
    made.put(own, {LATENTS: torch.from_numpy(found.latents)}, making, keep=False)
    return found.others


def taken_images(made: MadeRows) -> Denoised:
    """What stage 2 gives where all of it is there."""
    return Denoised(made=made, kept_after=[], trajectory_every=None, profile=None)


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


class _GroupsOf:
    """The groups of a job's images that are missing."""

    def __init__(self, job: DenoisingJob, missing: Container[int], size: int) -> None:
        """
        Args:
            size: images of a group, the last one's repeated.
        """
        self.job, self.size = job, size
        todo = [image for image in job.own if image in missing]
        self.groups = [todo[first : first + size] for first in range(0, len(todo), size)]
        self.evaluations = len(job.sampler.restart())

    @property
    def steps(self) -> int:
        """Of all of them."""
        return len(self.groups) * self.evaluations


class _Run:
    """What is the same for all groups of a job, and what is measured of the first."""

    def __init__(
        self, denoiser: Denoiser, plan: _GroupsOf, options: RunOptions, *, is_first: bool
    ) -> None:
        self.denoiser, self.job, self.options = denoiser, plan.job, options
        self.tables, self.group_size = tables_of(denoiser, plan.job, options), plan.size
        self.made_by = options.made_by(denoiser.facts(), plan.size)
        self.evaluations, self.is_first = plan.evaluations, is_first
        self.kept_after = steps_to_keep(self.evaluations, options.save_trajectory)
        self.profile: Profile | None = None
        self.profiler: Profiler | None = None

    def profile_to(self, folder: Path) -> None:
        """Profile some steps of the first group."""
        steps = self.options.profiled_steps(self.evaluations)
        self.profiler = self.denoiser.profiler(folder, steps)

    def tensors_of(self, images: int) -> dict[str, torch.Tensor]:
        """What the group that was denoised gave, of its first so many images."""
        latents = self.denoiser.latents()  # [G, C, h, w]
        kept = np.reshape(self.denoiser.trajectory, (-1, *latents.shape)).swapaxes(0, 1)
        arrays = {LATENTS: latents, **({TRAJECTORY: kept} if self.kept_after else {})}
        return {name: torch.from_numpy(array[:images].copy()) for name, array in arrays.items()}

    def denoise_group(self, own: list[int], group: GroupProgress) -> float:
        """All steps of some images, or those that an earlier run has not kept.

        Returns the seconds that the devices took for all steps of one of them. A group that is not
        full repeats its last image, since another shape would be compiled anew.
        """
        chosen = np.array(own + [own[-1]] * (self.group_size - len(own)))
        self.denoiser.start(Share(self.job, chosen, self.tables))
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
        seconds = (report.parts().get("run", 0.0) - before) * self.evaluations / max(made, 1)
        return round(seconds / len(own), 4)

    def _steps(self, group: GroupProgress) -> Iterator[Any]:
        return self.denoiser.run(
            keep_after=self.kept_after,
            pause_after=group.pause_after(self.evaluations),
            pause=group.wants_pause,
            wants_look=group.wants_look,
            profiler=self.profiler if self.is_first else None,
        )

    def measure_first(self) -> None:
        """What is measured of the first group alone."""
        if self.is_first:
            self.denoiser.repeat(self.options.repeat)
            self.profile = self.profiler.result() if self.profiler is not None else None
        self.is_first = False


def steps_to_keep(evaluations: int, every: int | None) -> list[int]:
    """The numbers of steps after which a trajectory has latents; the last is always among them."""
    if every is None:
        return []
    return sorted({*range(every, evaluations + 1, every), evaluations})
