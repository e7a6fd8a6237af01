"""The operations of a profile: put together, by module, and printed."""

import re
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.compute.clock import StageReport
from common.files.report import Operation, Profile

MOST_OPERATIONS = 40  # in a report
MOST_LINES = 12  # printed
NO_MODULE = "outside of modules"
# What a part of a module's path says of its kind; the innermost part that says something counts.
KINDS = {
    "norm": re.compile(r".*norm"),
    "attention": re.compile(r".*attn|attention"),
    "feed-forward": re.compile(r"(ff|mlp)$"),
    "resnet": re.compile(r"resnets"),
    "resampling": re.compile(r"(down|up)samplers"),
    "embedding": re.compile(r"time_proj$|add_time_proj$|.*embeddings?$"),
    "convolution": re.compile(r"conv_(in|out)$|(post_)?quant_conv$"),
}


@dataclass(frozen=True, slots=True)
class TracedEvent:
    """An operation's run on one device."""

    name: str
    module: str
    seconds: float  # self time


class Profiler(ABC):
    """Watches some steps of a stage's work: `start`, each `step`, `stop`, then `result`."""

    def __init__(self, steps: range | None, report: StageReport) -> None:
        """
        Args:
            steps: to trace; None for work that has none and is one step itself.
        """
        self.steps = range(1) if steps is None else steps
        self.reported_steps = steps
        self.report = report

    def start(self) -> None:
        """Start to trace; everything handed to the devices before must be done.

        Raises:
            UnfitEnvironmentError: the trace cannot be written.
        """
        with self.report.part("profile"):
            self._start()
            self._began = time.perf_counter()

    @abstractmethod
    def step(self, number: int) -> AbstractContextManager[Any]:
        """Mark what a block hands to the devices as a step."""

    def stop(self) -> None:
        """End the trace, and write it; everything handed to the devices must be done.

        Raises:
            UnfitEnvironmentError: as `start`.
        """
        self.window_seconds = time.perf_counter() - self._began
        with self.report.part("profile"):
            self._stop()

    def result(self) -> Profile:
        """What the trace holds."""
        with self.report.part("profile"):
            return self._read()

    @abstractmethod
    def _start(self) -> None: ...

    @abstractmethod
    def _stop(self) -> None: ...

    @abstractmethod
    def _read(self) -> Profile: ...


def make_profile(
    events: Iterable[TracedEvent],
    *,
    devices: int,
    trace: Path,
    how_to_open: str,
    steps: range | None,
    window_seconds: float,
    idle_seconds: float,
) -> Profile:
    """Sum a profile's events by operation and by module.

    Args:
        devices: whose mean is taken.
    """
    totals: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        totals[event.name, event.module].append(event.seconds / devices)
    operations = [
        Operation(name=name, module=module, seconds=round(sum(seconds), 6), count=len(seconds))
        for (name, module), seconds in totals.items()
    ]
    operations.sort(key=lambda operation: -operation.seconds)
    return Profile(
        trace=str(trace),
        how_to_open=how_to_open,
        steps=None if steps is None else (steps.start, steps.stop),
        window_seconds=round(window_seconds, 6),
        idle_seconds=round(idle_seconds, 6),
        operations=operations[:MOST_OPERATIONS],
        by_block=_summed((block_of(o.module), o.seconds) for o in operations),
        by_kind=_summed((kind_of(o.module), o.seconds) for o in operations),
    )


def _summed(items: Iterable[tuple[str, float]]) -> dict[str, float]:
    sums: dict[str, float] = defaultdict(float)
    for name, seconds in items:
        sums[name] += seconds
    return {name: round(sums[name], 6) for name in sorted(sums, key=lambda name: -sums[name])}


def block_of(module: str) -> str:
    """The largest block of a module's path: down_blocks.0, mid_block, conv_in, …"""
    parts = module.split(".")
    for end, part in enumerate(parts, 1):
        if part.isdigit() or part == "mid_block":
            return ".".join(parts[:end])
    return parts[0] or NO_MODULE


def kind_of(module: str) -> str:
    """The kind of a module, by the innermost part of its path that tells."""
    for part in reversed(module.split(".")):
        for kind, pattern in KINDS.items():
            if pattern.match(part):
                return kind
    return "other" if module else NO_MODULE


def self_times(spans: Sequence[tuple[float, float]]) -> list[float]:
    """Durations without those of the spans within each; spans are (start, end), in any order."""
    order = sorted(range(len(spans)), key=lambda i: (spans[i][0], -spans[i][1]))
    result = [end - start for start, end in spans]
    outer: list[int] = []
    for i in order:
        start, end = spans[i]
        while outer and spans[outer[-1]][1] <= start:
            outer.pop()
        if outer:
            result[outer[-1]] -= end - start
        outer.append(i)
    return result


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """How much time lies in at least one span."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def lines_of(profile: Profile) -> Iterator[str]:
    """A profile as lines to print."""
    what = "" if profile.steps is None else f" of steps {profile.steps[0]}:{profile.steps[1]}"
    window = profile.window_seconds
    busy = sum(profile.by_block.values())
    yield (
        f"  profile{what}: {1e3 * window:.1f} ms, of which operations {1e3 * busy:.1f} and none "
        f"{1e3 * profile.idle_seconds:.1f}"
    )
    yield f"    {'ms':>8} {'share':>6} {'times':>6}  operation"
    for operation in profile.operations[:MOST_LINES]:
        share = operation.seconds / window
        yield (
            f"    {1e3 * operation.seconds:8.2f} {share:6.1%} {operation.count:6}  "
            f"{operation.name}  {operation.module or NO_MODULE}"
        )
    rest = busy - sum(operation.seconds for operation in profile.operations[:MOST_LINES])
    yield f"    {1e3 * rest:8.2f} {rest / window:6.1%}         all others"
    for title, sums in (("by block", profile.by_block), ("by kind", profile.by_kind)):
        parts = [f"{name} {1e3 * seconds:.1f}" for name, seconds in sums.items()]
        yield f"    {title}, ms: {', '.join(parts)}"
    yield f"    {profile.how_to_open}"
