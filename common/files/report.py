"""What a stage reports of itself: where its time went, and `stageN_report.json`."""

import json
import os
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import psutil
from pydantic import BaseModel, ConfigDict, ValidationError

from common.text_files import read_text
from common.whole_files import write_text_whole

if TYPE_CHECKING:
    import torch

_process = psutil.Process()
_seconds_before = 0.0  # of the process, before its stage's turn came


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Seconds(_Fields):
    """Disjoint parts of the process's time; they sum to `wall_seconds`."""

    imports: float = 0.0
    """From the start: Python, the script, the libraries; finding the devices."""
    settings: float = 0.0
    """Reading settings, checking the input, asking whether the output is fresh."""
    checkpoint_read: float = 0.0
    """Making the model and opening its files; by PyTorch reading all of them."""
    host_to_device: float = 0.0
    """Reading the weights, mapped from their files, and moving them and the inputs."""
    scheduler_tables: float = 0.0
    """Turning the scheduler into tables (stage 2)."""
    noise: float = 0.0
    """Drawing the noises (stage 2)."""
    trace: float = 0.0
    """Tracing the model into programs."""
    compile: float = 0.0
    """Compiling the programs, or fetching them from the compile cache."""
    warm_up: float = 0.0
    """Runs before the measured one, when they are asked for."""
    run: float = 0.0
    """Encoding, denoising or decoding; ends when the devices are done."""
    trajectory: float = 0.0
    """Decoding a trajectory (stage 3)."""
    device_to_host: float = 0.0
    """Fetching the result."""
    blending: float = 0.0
    """Cutting latents into tiles and blending those (stage 3, `--tile`)."""
    repeats: float = 0.0
    """The further runs of `--repeat`."""
    profile: float = 0.0
    """Profiling: the profiler's start and end, further runs under it, reading its trace."""
    image_encoding: float = 0.0
    """Making picture files' bytes (stage 3)."""
    writing: float = 0.0
    """Writing the outputs and flushing them to the disk."""
    other: float = 0.0
    """What is in no other part."""


class Repeat(_Fields):
    """The steady state, measured by `--repeat`; each ends when the devices are done."""

    seconds: list[float]
    """Of each run of all steps (stage 2), decoding (3) or encoding (1) of the first group."""
    min: float
    median: float
    max: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Self:
        return cls(
            seconds=[round(second, 6) for second in seconds],
            min=round(min(seconds), 6),
            median=round(statistics.median(seconds), 6),
            max=round(max(seconds), 6),
        )


class Program(_Fields):
    """A compiled program."""

    name: str
    seconds: float
    """Of compiling, or of fetching from the compile cache."""
    from_cache: bool
    flops: float | None
    """Of one call on one device, by XLA's count; a loop's body is counted once."""


class Programs(_Fields):
    """The compiled programs."""

    compiled: int = 0
    from_cache: int = 0
    each: list[Program] = []


class Operation(_Fields):
    """An operation in a profile."""

    name: str
    """As the compiled program or torch names it."""
    module: str
    """Path of diffusers' or transformers' module that it belongs to; empty for none."""
    seconds: float
    """Self time, the mean over the devices."""
    count: int
    """How often it ran, on all devices."""


class Profile(_Fields):
    """What `--profile` found."""

    trace: str
    """The trace's file."""
    how_to_open: str
    """How to look at it, as a sentence."""
    steps: tuple[int, int] | None
    """The steps under the profiler, as first and one after the last (stage 2)."""
    window_seconds: float
    """Of the profiled work, by the host's clock."""
    idle_seconds: float
    """Of the window, when a device ran no operation; the mean over the devices."""
    operations: list[Operation]
    """The longest first."""
    by_block: dict[str, float]
    """Self seconds by the model's largest blocks."""
    by_kind: dict[str, float]
    """Self seconds by kinds of modules: resnet, attention, norm, …"""


class Report(_Fields):
    """`stageN_report.json`."""

    stage: int
    written_at: str
    wall_seconds: float
    """From the process's start, or its turn's, to the writing of this report."""
    preload_seconds: float | None = None
    """Of the process before its turn: `run_all.sh` lets a stage import while another one runs."""
    seconds: Seconds
    step_seconds: list[float] | None = None
    """From the end of the step before to its own end, for steps called one by one (stage 2)."""
    repeat: Repeat | None = None
    flops: float | None = None
    """Of `run` on all devices, by XLA's count of the compiled programs. The projections of the
    prompts, under 1 % of SDXL's, are counted in every step."""
    tflops_per_second: float | None = None
    """Of `run`; of the repeats where there are some."""
    share_of_peak: float | None = None
    """Of the devices' peak in bfloat16, where it is known and the model computes in it."""
    peak_host_bytes: int
    """The most memory that the process held, pages of mapped files included."""
    peak_device_bytes: int | None = None
    """The most that a device held; null where it does not tell, as on CPUs."""
    weights_bytes: int | None = None
    host_bytes_while_loading: int | None = None
    """Memory that no file backs, taken while weights moved; on CPUs with the devices' copy."""
    shapes: dict[str, list[int]]
    """Of what was written."""
    dtype: str
    """That the model computes in."""
    dtype_asked: str
    backend: str
    """jax: compiled programs; torch: PyTorch as it is."""
    mesh: str | None = None
    platform: str
    device: str
    """The devices' kind."""
    devices: int
    programs: Programs | None = None
    profile: Profile | None = None
    versions: dict[str, str]
    recipe: dict[str, Any] | None = None
    """All that determined the pictures (stage 3); other outputs have it in their headers."""


class StageReport:
    """Collects a stage's report while it runs.

    Every second since the process began belongs to the phase or part that is open: phases follow
    one another, parts lie within them and may nest.
    """

    def __init__(self, stage: int) -> None:
        self.stage = stage
        self.facts: dict[str, Any] = {}
        self.step_seconds: list[float] = []
        self.repeats: list[float] = []
        self.flops = 0.0  # of `run`
        self.repeated_flops = 0.0
        self.programs = Programs()
        self._born = time.perf_counter() - process_age() + _seconds_before
        self._seconds = dict.fromkeys(Seconds.model_fields, 0.0)
        self._open = ["imports"]
        self._since = self._born

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
        """Seconds since the process began."""
        return time.perf_counter() - self._born

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
            preload_seconds=round(_seconds_before, 4) or None,
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
    """Begin to count a stage's seconds: its turn has come."""
    global _seconds_before
    _seconds_before = process_age()


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


def report_path(output_dir: Path, stage: int) -> Path:
    """Where a stage's report stands."""
    return output_dir / f"stage{stage}_report.json"


def read_report(output_dir: Path, stage: int) -> Report | None:
    """A stage's last report; None where there is none that can be read."""
    try:
        text = read_text(report_path(output_dir, stage))
        return Report.model_validate_json(text)
    except (OSError, ValueError, ValidationError):
        return None


def json_schema() -> str:
    """The JSON schema of `stageN_report.json`."""
    return json.dumps(Report.model_json_schema(), indent=2, ensure_ascii=False) + "\n"
