"""One group's part of the progress that is kept."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from common.files.kept_progress import Group, Progress
from common.messages import say
from common.progress import Shown
from common.stopping import StoppedError, StopRequest

if TYPE_CHECKING:
    from common.sampling.denoiser import Denoiser


class GroupProgress:
    """One group's part of the progress that is kept; keeps nothing where there is none."""

    def __init__(
        self,
        progress: Progress | None,
        stop: StopRequest | None,
        every: int | None,
        key: Group,
        bar: Shown,
    ) -> None:
        """
        Args:
            every: steps between two saves; None goes by time.
            key: what the group is known by.
        """
        self.progress, self.stop, self.every = progress, stop, every
        self.key, self.bar = key, bar

    def resume(self, denoiser: "Denoiser") -> None:
        """Go on where an earlier run was stopped within this group."""
        kept = None
        if self.progress is not None:
            self.progress.count_from_now()
        if self.progress is not None and denoiser.can_resume:
            kept = self.progress.read_steps(self.key)
        if kept is not None:
            denoiser.resume(kept)
            self.bar.skip(denoiser.done)
            say(f"  goes on after step {denoiser.done} of {denoiser.evaluations}")
        self.shown = denoiser.done

    def pause_after(self, evaluations: int) -> range:
        """The steps after which progress is kept whatever the time."""
        every = self.every if self.progress is not None else None
        return range(every, evaluations, every) if every is not None else range(0)

    def wants_pause(self) -> bool:
        """Whether progress is to be kept as soon as what runs is done."""
        if self.stop is not None and self.stop.number is not None:
            return True
        return self.progress is not None and self.every is None and self.progress.is_due()

    @property
    def wants_look(self) -> Callable[[], bool] | None:
        """Whether it is time for a look at what is made; None where nobody looks."""
        watcher = self.bar.watcher
        return None if watcher is None else watcher.wants_look

    def after_a_range(self, denoiser: "Denoiser") -> None:
        """Show what is done, keep it where it is time, and stop where that is asked for."""
        look = None if denoiser.seen is None else denoiser.look
        self.bar.update(denoiser.done - self.shown, look)
        self.shown = denoiser.done
        if not denoiser.is_idle:
            return
        # Once: what comes from here on stops the next range.
        number = None if self.stop is None else self.stop.number
        due = denoiser.done < denoiser.evaluations and (
            self.wants_pause() or denoiser.done in self.pause_after(denoiser.evaluations)
        )
        keeps = self.progress is not None and denoiser.can_resume
        if keeps and (number is not None or due):
            assert self.progress is not None
            with denoiser.report.part("writing"):
                self.progress.save_steps(self.key, denoiser.state_to_keep())
        if number is not None and (keeps or denoiser.done < denoiser.evaluations):
            steps = f"step {denoiser.done} of {denoiser.evaluations}"
            said = f"after {steps}, which are kept: the same command goes on from there"
            if not keeps:
                said = f"after {steps}: the same command begins these images again"
            raise StoppedError(number, said)
