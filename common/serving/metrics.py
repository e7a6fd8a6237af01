"""What a server tells Prometheus: the queue, what has ended, where its time went."""

from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from common.files.report import read_report
from common.files.stage_table import LAST, STAGES
from common.serving.jobs import Job, State

PREFIX = "staged_diffusion"
SECONDS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 900)  # of the histograms


class Metrics:
    """Counts since the server began."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        in_it: dict[str, Any] = {"namespace": PREFIX, "registry": self._registry}
        self._jobs = Gauge("jobs", "Jobs that have not ended.", ["state"], **in_it)
        self._ended = Counter("jobs_ended", "Jobs that have ended.", ["state"], **in_it)
        self._images = Counter("images", "Pictures of jobs that are done.", **in_it)
        self._programs = Counter("programs_compiled", "Programs that were compiled.", **in_it)
        self._whole = Histogram(
            "job_seconds", "From acceptance to the end.", buckets=SECONDS, **in_it
        )
        self._stage = Histogram(
            "stage_seconds", "Of a stage, for one job.", ["stage"], buckets=SECONDS, **in_it
        )
        self._memory = Gauge(
            "peak_memory_bytes", "The most that was held.", ["stage", "where"], **in_it
        )

    def count(self, ended: Iterable[Job]) -> None:
        """Take jobs that have ended, each once."""
        for job in ended:
            self._ended.labels(job.state).inc()
            if job.ended_at is not None:
                self._whole.observe(job.ended_at - job.accepted_at)
            for stage in STAGES:
                report = read_report(job.run_dir, stage.number)
                if report is None:
                    continue
                self._stage.labels(str(stage.number)).observe(report.wall_seconds)
                if report.programs is not None:
                    self._programs.inc(report.programs.compiled)
                if stage is LAST and job.state is State.DONE:
                    self._images.inc(sum(shape[0] for shape in report.shapes.values()))
                self._memory.labels(str(stage.number), "host").set(report.peak_host_bytes)
                if report.peak_device_bytes is not None:
                    self._memory.labels(str(stage.number), "device").set(report.peak_device_bytes)

    def text(self, now: Mapping[State, int]) -> bytes:
        """All of it, as Prometheus reads it.

        Args:
            now: how many jobs are in a state.
        """
        for state in (State.WAITING, State.RUNNING):
            self._jobs.labels(state).set(now.get(state, 0))
        return generate_latest(self._registry)
