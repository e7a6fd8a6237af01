"""Profile compiled programs by jax's profiler, and read its trace."""

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import jax
import torch
from jax._src.profiler import _profile_state as jax_profiler_state
from jax.profiler import ProfileData

from common.compute.clock import StageReport
from common.compute.profile_tables import (
    Profiler,
    TracedEvent,
    covered,
    make_profile,
    self_times,
)
from common.compute.programs import CompiledProgram
from common.errors import UnfitEnvironmentError, in_one_line
from common.files.report import Profile

NANOSECOND = 1e-9
STEP = "step"  # the annotation's name


class JaxProfiler(Profiler):
    """Traces a window of warm steps, and says which operations they spent their time on."""

    def __init__(
        self,
        folder: Path,
        steps: range | None,
        report: StageReport,
        programs: Mapping[Any, CompiledProgram],
        model: torch.nn.Module,
    ) -> None:
        """
        Args:
            folder: of the trace; jax puts each run's below plugins/profile.
            steps: as `Profiler` takes them.
            programs: the compiled programs, at the end, for the names of their operations.
            model: whose modules those names hold.
        """
        super().__init__(steps, report)
        self.folder = folder
        self.programs = programs
        self.model = model

    def _start(self) -> None:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # it would slow the host down
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(str(self.folder), profiler_options=options)

    def step(self, number: int) -> AbstractContextManager[Any]:
        return jax.profiler.StepTraceAnnotation(STEP, step_num=number)

    def _stop(self) -> None:
        try:
            with self._writing():
                jax.profiler.stop_trace()
        finally:
            # jax keeps a trace that it could not write, and would begin none after it.
            jax_profiler_state.reset()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError) as error:
            raise UnfitEnvironmentError(
                f"--profile: no trace can be written to {self.folder} ({in_one_line(error)}): "
                "choose another --profile_dir"
            ) from None

    def _read(self) -> Profile:
        modules = {name for name, _ in self.model.named_modules()}
        programs = self.programs.values()
        names = dict(found for program in programs for found in operation_names(program))
        trace = max(self.folder.rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime)
        runs = read_operations(trace)
        events, idle = [], 0.0
        for lines in runs.values():
            spans = [span for line in lines for _, _, span in line]
            idle += self.window_seconds - covered(spans)
            for line in lines:
                seconds = self_times([span for _, _, span in line])
                for (module, operation, _), second in zip(line, seconds, strict=True):
                    path = names.get((module, operation), "")
                    events.append(TracedEvent(operation, module_path(path, modules), second))
        devices = max(1, len(runs))
        return make_profile(
            events,
            devices=devices,
            trace=trace,
            how_to_open=f"open it: xprof --logdir {self.folder} (pip install xprof), or "
            f"{trace.parent}/*.trace.json.gz in ui.perfetto.dev",
            steps=self.reported_steps,
            window_seconds=self.window_seconds,
            idle_seconds=idle / devices,
        )


# An operation: the program it is of, its name there, and its start and end in seconds.
Run = tuple[str, str, tuple[float, float]]


def read_operations(trace: Path) -> dict[str, list[list[Run]]]:
    """Device → lines (threads, streams) → the operations that ran there.

    On CPUs they are the events of the host's threads that name an operation; accelerators have a
    plane each, on TPUs with a line of its own for operations.
    """
    devices: dict[str, list[list[Run]]] = defaultdict(list)
    for plane in ProfileData.from_file(str(trace)).planes:
        lines = list(plane.lines)
        of_operations = [line for line in lines if line.name == "XLA Ops"]
        for line in of_operations or lines:
            by_device: dict[str, list[Run]] = defaultdict(list)
            for event in line.events:
                stats = dict(event.stats)
                operation = stats.get("hlo_op")
                if operation is None and of_operations:
                    operation = event.name.partition(" = ")[0].lstrip("%")
                if operation is None:
                    continue
                device = plane.name
                if plane.name.startswith("/host"):
                    device = f"CPU {stats.get('device_ordinal', 0)}"
                span = (event.start_ns * NANOSECOND, event.end_ns * NANOSECOND)
                by_device[device].append((str(stats.get("hlo_module", "")), str(operation), span))
            for device, runs in by_device.items():
                devices[device].append(runs)
    return devices


def operation_names(program: CompiledProgram) -> Iterator[tuple[tuple[str, str], str]]:
    """((program's name, operation), path of scopes) of a compiled program's operations."""
    text = program.executable.as_text()
    (module,) = re.findall(r"^HloModule ([^\s,]+)", text) or [""]
    for match in re.finditer(
        r'^\s*(?:ROOT )?%?([\w.-]+) = .*?metadata={[^}]*?op_name="([^"]*)"', text, re.MULTILINE
    ):
        yield (module, match[1]), match[2]


def module_path(op_name: str, modules: Collection[str]) -> str:
    """The module in an operation's name, such as "jit(denoise)/mid_block/resnets.0/conv1/dot"."""
    path = ""
    for part in op_name.split("/"):
        longer = f"{path}.{part}" if path else part
        path = longer if longer in modules else path
    return path
