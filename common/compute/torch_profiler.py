"""Profile torch modules by torch's own profiler."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from common.compute.clock import StageReport
from common.compute.profile_tables import Profiler, TracedEvent, covered, make_profile
from common.errors import UnfitEnvironmentError
from common.files.report import Profile

MICROSECOND = 1e-6
MODULE, STEP = "module: ", "step: "  # how the trace marks ranges of modules and of steps


class TorchProfiler(Profiler):
    """Traces a window of steps, and says which operations they spent their time on."""

    def __init__(
        self,
        file: Path,
        steps: range | None,
        report: StageReport,
        modules: Mapping[str, torch.nn.Module],
    ) -> None:
        """
        Args:
            file: the trace's.
            steps: as `Profiler` takes them.
            modules: whose submodules the trace and the table name.
        """
        super().__init__(steps, report)
        self.file = file
        self.modules = modules
        self._open = ExitStack()

    def _start(self) -> None:
        self._open.enter_context(_named_in_trace(self.modules))
        self._profile = self._open.enter_context(profile(activities=[ProfilerActivity.CPU]))

    def step(self, number: int) -> AbstractContextManager[Any]:
        return record_function(f"{STEP}{number}")

    def _stop(self) -> None:
        self._open.close()
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self._profile.export_chrome_trace(str(self.file))
        except (OSError, RuntimeError) as error:
            raise UnfitEnvironmentError(
                f"--profile: {self.file} cannot be written ({error}): choose another --profile_dir"
            ) from None

    def _read(self) -> Profile:
        found = [
            event
            for event in self._profile.events() or []
            if not event.name.startswith((MODULE, STEP))
        ]
        events = [
            TracedEvent(event.name, _module_of(event), event.self_cpu_time_total * MICROSECOND)
            for event in found
        ]
        spans = [
            (event.time_range.start * MICROSECOND, event.time_range.end * MICROSECOND)
            for event in found
        ]
        return make_profile(
            events,
            devices=1,
            trace=self.file,
            how_to_open=f"open it: {self.file} in ui.perfetto.dev",
            steps=self.reported_steps,
            window_seconds=self.window_seconds,
            idle_seconds=self.window_seconds - covered(spans),
        )


def _module_of(event: Any) -> str:
    while event is not None:
        if event.name.startswith(MODULE):
            return str(event.name.removeprefix(MODULE))
        event = event.cpu_parent
    return ""


@contextmanager
def _named_in_trace(modules: Mapping[str, torch.nn.Module]) -> Iterator[None]:
    """Let every submodule's forward stand in the trace under its path."""
    opened: list[Any] = []

    def hooks_for(path: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def enter(*_: Any) -> None:
            opened.append(record_function(f"{MODULE}{path}"))
            opened[-1].__enter__()

        def leave(*_: Any) -> None:
            opened.pop().__exit__(None, None, None)

        return enter, leave

    hooks = []
    for root, module in modules.items():
        for name, submodule in module.named_modules(prefix=root):
            enter, leave = hooks_for(name)
            hooks += [
                submodule.register_forward_pre_hook(enter),
                submodule.register_forward_hook(leave),
            ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
