"""What a stage reports of itself: where its time went, and `stageN_report.json`."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from common.text_files import read_text


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
    waiting: float = 0.0
    """For the next group of the stage that runs beside (stage 3, `--stream`)."""
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
    from_store: int = 0
    """Whose trace was read: what an earlier process traced."""
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
    """Of those that were read; what the process had already is not counted."""
    host_bytes_while_loading: int | None = None
    """Memory that no file backs, taken while weights moved; on CPUs with the devices' copy."""
    shapes: dict[str, list[int]]
    """Of what was written."""
    overrides: dict[str, list[Any]] = {}
    """Settings of the run that flags overrode: the run's value, and the one in its place."""
    rows_taken: int = 0
    """Of the rows that were written, those that an earlier file had and nothing computed anew."""
    images_of_others: int = 0
    """Of other runs, denoised in the same group: `run` is the time of all of them (stage 2)."""
    dtype: str
    """That the model computes in."""
    dtype_asked: str
    backend: str
    """jax: compiled programs; torch: PyTorch as it is; remote: the VAE of a server."""
    mesh: str | None = None
    platform: str
    device: str
    """The devices' kind; of a server its host."""
    devices: int
    programs: Programs | None = None
    profile: Profile | None = None
    versions: dict[str, str]
    recipe: dict[str, Any] | None = None
    """All that determined the pictures (stage 3); other outputs have it in their headers."""


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
