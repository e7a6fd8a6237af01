"""Where a stage's time goes, and the memory that it takes."""

import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from common.files.report import Programs, Repeat, Report, Seconds, report_path
from common.whole_files import write_text_whole

if TYPE_CHECKING:
    import torch


_process = psutil.Process()

# Of a process that imports libraries ahead, before the turn of the stage that it runs came.
_seconds_ahead = 0.0


class StageReport:
    """Collects a stage's report while it runs.

    Every second belongs to the phase or part that is open: phases follow one another, parts lie
    within them and may nest.
    """

    def __init__(self, stage: int, *, since_process_began: bool = True) -> None:
        """
        Args:
            since_process_began: count from then, or from the stage's turn where the process has
                imported ahead; False for one run of several of a process, from now.
        """
        self.stage = stage
        self.facts: dict[str, Any] = {}
        self.step_seconds: list[float] = []
        self.repeats: list[float] = []
        self.flops = 0.0  # of `run`
        self.repeated_flops = 0.0
        self.programs = Programs()
        self._seconds_ahead = _seconds_ahead if since_process_began else 0.0
        self._began = time.perf_counter()
        if since_process_began:
            self._began -= process_age() - _seconds_ahead
        self._seconds = dict.fromkeys(Seconds.model_fields, 0.0)
        self._open = ["imports"]
        self._since = self._began

    def _charge(self) -> None:
        """Give the seconds since the last change to what is open."""
        now = time.perf_counter()
        self._seconds[self._open[-1]] += now - self._since
        self._since = now

    def phase(self, name: str) -> None:
        """From here on seconds count as `name`, until the next phase."""
        self._charge()
        assert name in self._seconds and len(self._open) == 1
        self._open = [name]

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count a block's seconds as `name`, without those of parts within it."""
        assert name in self._seconds
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def count_flops(self, part: str, flops: float) -> None:
        """Add what the programs computed in `run` or in the repeats; other parts do not count."""
        if part == "run":
            self.flops += flops
        elif part == "repeats":
            self.repeated_flops += flops

    def watch_memory(
        self, weights: "Iterable[tuple[str, torch.Tensor]]"
    ) -> "Iterator[tuple[str, torch.Tensor]]":
        """Hand weights on to devices, and note how much memory of its own the host took meanwhile.

        That is memory that no file backs; on a CPU it holds the devices' copy as well.
        """
        before, most, size = own_memory(), 0, 0
        for name, tensor in weights:
            size += tensor.nbytes
            yield name, tensor
            most = max(most, own_memory() - before)
        self.facts["weights_bytes"] = size
        self.facts["host_bytes_while_loading"] = most

    def wall_seconds(self) -> float:
        """Seconds since the first that is counted."""
        return time.perf_counter() - self._began

    def parts(self) -> dict[str, float]:
        """The seconds of each part that took any."""
        self._charge()
        return {name: seconds for name, seconds in self._seconds.items() if seconds > 0}

    def write(self, output_dir: Path, *, peak_flops: float | None = None, **facts: Any) -> None:
        """Write `stageN_report.json`.

        Args:
            peak_flops: of all devices in the model's dtype, per second.
            facts: the fields of `Report` that are not collected here.
        """
        parts = self.parts()
        speed = None
        if self.repeated_flops:
            speed = self.repeated_flops / sum(self.repeats)
        elif self.flops:
            speed = self.flops / parts["run"]
        report = Report(
            stage=self.stage,
            written_at=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            wall_seconds=round(sum(parts.values()), 4),
            preload_seconds=round(self._seconds_ahead, 4) or None,
            seconds=Seconds(**{name: round(seconds, 4) for name, seconds in parts.items()}),
            step_seconds=[round(second, 6) for second in self.step_seconds] or None,
            repeat=Repeat.of(self.repeats) if self.repeats else None,
            flops=self.flops or None,
            tflops_per_second=None if speed is None else round(speed / 1e12, 6),
            share_of_peak=round(speed / peak_flops, 4) if speed and peak_flops else None,
            peak_host_bytes=peak_memory(),
            programs=self.programs if self.programs.each else None,
            **self.facts,
            **facts,
        )
        text = report.model_dump_json(indent=2) + "\n"
        write_text_whole(report_path(output_dir, self.stage), text)


def count_from_now() -> None:
    """Begin to count the seconds of the one stage that this process runs: its turn has come."""
    global _seconds_ahead
    _seconds_ahead = process_age()


def process_age() -> float:
    """Seconds since this process began."""
    stat = Path("/proc/self/stat")
    if stat.exists():
        # psutil's create_time is off by up to a second here: it adds whole seconds.
        ticks = int(stat.read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - _process.create_time()


def own_memory() -> int:
    """Bytes of the process's memory that are no pages of files."""
    memory = _process.memory_info()
    return int(memory.rss - getattr(memory, "shared", 0))


def peak_memory() -> int:
    """The most bytes that the process held at once."""
    if sys.platform == "win32":
        return int(_process.memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
