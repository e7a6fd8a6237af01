"""Profile torch modules by torch's own profiler."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from common.errors import UnfitEnvironmentError
from common.profile import TracedEvent, covered, make_profile
from common.report import Profile, StageReport

MICROSECOND = 1e-6
MODULE = "module: "  # how the trace marks a module's range


def profile_torch(
    work: Callable[[], Any],
    modules: Mapping[str, torch.nn.Module],
    folder: Path,
    report: StageReport,
) -> Profile:
    """Run some work under torch's profiler, and write its trace.

    Args:
        modules: whose submodules the trace and the table name.
        folder: of the trace.

    Raises:
        UnfitEnvironmentError: the trace cannot be written.
    """
    file = folder / "encode.pt.trace.json.gz"
    with report.part("profile"):
        with _named_in_trace(modules), profile(activities=[ProfilerActivity.CPU]) as profiler:
            began = time.perf_counter()
            work()
            window = time.perf_counter() - began
        try:
            folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(file))
        except (OSError, RuntimeError) as error:
            raise UnfitEnvironmentError(
                f"--profile: {file} cannot be written ({error}): choose another --profile_dir"
            ) from None
        found = profiler.events() or []
        events = [
            TracedEvent(event.name, _module_of(event), event.self_cpu_time_total * MICROSECOND)
            for event in found
            if not event.name.startswith(MODULE)
        ]
        spans = [
            (event.time_range.start * MICROSECOND, event.time_range.end * MICROSECOND)
            for event in found
            if not event.name.startswith(MODULE)
        ]
        return make_profile(
            events,
            devices=1,
            trace=file,
            how_to_open=f"open it: {file} in ui.perfetto.dev",
            steps=None,
            window_seconds=window,
            idle_seconds=window - covered(spans),
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
