"""Compiled programs, and whether they came from the persistent cache."""

import json
import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import jax

from common.compute.clock import StageReport
from common.files.report import Program
from common.stopping import stopping_at_once

CACHE_HIT_EVENT = "/jax/compilation_cache/cache_hits"


class _CacheHits(threading.local):
    """Programs that came from the persistent cache; jax says so in the thread that compiles."""

    count = 0


_cache_hits = _CacheHits()


def _count_cache_hit(event: str, **_: object) -> None:
    _cache_hits.count += event == CACHE_HIT_EVENT


jax.monitoring.register_event_listener(_count_cache_hit)


@dataclass(frozen=True)
class CompiledProgram:
    """A compiled program to call."""

    executable: Any
    flops: float | None  # of one call on one device, by XLA's count

    def __call__(self, *arguments: Any) -> Any:
        return self.executable(*arguments)


def compiled_in(module: Any, mesh: jax.sharding.Mesh, operations: str) -> Hashable:
    """What is compiled into a module's programs besides shapes, which its weights are not.

    Modules that differ in their weights alone, by a LoRA for example, share their programs.

    Args:
        module: diffusers', in the dtype that it computes in.
        mesh: of the devices that are compiled for, their platform with them.
        operations: "fast" or "torchax".
    """
    # Where it was saved, and by which version, stands under names that begin so.
    config = {name: value for name, value in module.config.items() if not name.startswith("_")}
    architecture = type(module).__name__, json.dumps(config, sort_keys=True)
    return (*architecture, module.dtype, mesh, operations)


def compile_program(lower: Callable[[], Any], name: str, report: StageReport) -> CompiledProgram:
    """Trace and compile a program, and report whether it came from the persistent cache.

    Args:
        lower: traces it.
    """
    with report.part("trace"), stopping_at_once(f"tracing {name}"):
        lowered = lower()
    began, before = time.perf_counter(), _cache_hits.count
    with report.part("compile"):
        with stopping_at_once(f"compiling {name}"):
            executable = lowered.compile()
        analysis = executable.cost_analysis()
        program = CompiledProgram(executable, analysis.get("flops") if analysis else None)
    from_cache = _cache_hits.count > before
    report.programs.from_cache += from_cache
    report.programs.compiled += not from_cache
    report.programs.each.append(
        Program(
            name=name,
            seconds=round(time.perf_counter() - began, 4),
            from_cache=from_cache,
            flops=program.flops,
        )
    )
    return program
