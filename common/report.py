"""What a stage reports of itself: where its time went, and `stageN_report.json`."""

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from common.whole_files import write_text_whole

if TYPE_CHECKING:
    import torch


class StageReport:
    """Disjoint parts of a process's wall time, and facts about what it did.

    The clock starts when the process did, so that the interpreter's start-up is in `other`.
    """

    def __init__(self, stage: int) -> None:
        self.stage = stage
        self.seconds: dict[str, float] = {}
        self.facts: dict[str, Any] = {}
        self._born = psutil.Process().create_time()
        self._inner = [0.0]  # seconds of parts within each open one

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the seconds of a block to the part `name`, without those of parts within it."""
        began = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            seconds = time.perf_counter() - began
            self.add(name, seconds - self._inner.pop())
            self._inner[-1] += seconds

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

    def add(self, name: str, seconds: float) -> None:
        """Add seconds to a part."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def wall_seconds(self) -> float:
        """Seconds since the process began."""
        return time.time() - self._born

    def write(self, output_dir: Path) -> None:
        """Write `stageN_report.json`; parts and `other` sum to `wall_seconds`."""
        wall = self.wall_seconds()
        parts = {name: round(seconds, 4) for name, seconds in self.seconds.items()}
        parts["other"] = round(wall - sum(parts.values()), 4)
        content = {
            "stage": self.stage,
            "wall_seconds": round(wall, 4),
            "seconds": parts,
            **self.facts,
        }
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        write_text_whole(report_path(output_dir, self.stage), text)


def own_memory() -> int:
    """Bytes of the process's memory that are no pages of files."""
    memory = psutil.Process().memory_info()
    return int(memory.rss - getattr(memory, "shared", 0))


def report_path(output_dir: Path, stage: int) -> Path:
    """Where a stage's report stands."""
    return output_dir / f"stage{stage}_report.json"


def read_report(output_dir: Path, stage: int) -> dict[str, Any]:
    """A stage's last report, empty where there is none."""
    try:
        content = json.loads(report_path(output_dir, stage).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
