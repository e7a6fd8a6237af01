"""Compile for a TPU that is not there, with the compiler in the `libtpu` wheel."""

import json
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import messages
from common.compute import tpu_estimate, tpu_schedule
from common.compute.chips import CHIPS, Chip
from common.compute.sharding import name_of
from common.errors import (
    OUT_OF_DEVICE_MEMORY,
    BadSettingError,
    UnfitEnvironmentError,
    in_one_line,
)
from common.stopping import stopping_at_once
from common.whole_files import write_text_whole

if TYPE_CHECKING:
    from jax.sharding import Mesh


LATENCIES = (1e-6, tpu_estimate.COLLECTIVE_LATENCY, 10e-6)  # seconds
FORM = re.compile(r"(\w+):(\d+x\d+(?:x\d+)?)")


def chip_of(topology: str) -> Chip:
    """The chip of a topology such as v6e:2x4.

    Raises:
        BadSettingError: not of that form, or a chip whose figures are not known.
    """
    match = FORM.fullmatch(topology)
    if match is None or match[1] not in CHIPS:
        raise BadSettingError(
            f"--topology {topology} is not understood: give a chip and its grid, such as v6e:2x4 "
            f"(chips: {', '.join(CHIPS)})"
        )
    return CHIPS[match[1]]


def prepare_environment() -> None:
    """Keep jax from looking for a chip; call before jax is imported."""
    if find_spec("libtpu") is None:
        raise UnfitEnvironmentError(
            "--topology needs the TPU compiler: pip install 'jax[tpu]', or tools/set_up.sh tpu"
        )
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["JAX_PLATFORMS"] = "cpu"
    # Another process may compile at the same time; nothing here touches a chip.
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    # Without these the library complains of a machine that is none of a TPU's.
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v6e-1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")


def devices_of(topology: str) -> list[Any]:
    """The devices of a topology, to make a mesh of.

    Raises:
        BadSettingError: the compiler knows no such grid.
    """
    from jax.experimental import topologies

    grid = topology.split(":")[1]
    single = {"chips_per_host_bounds": (1, 1, 1)} if set(grid) <= {"1", "x"} else {}
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=topology, **single)
    except Exception as error:
        raise BadSettingError(
            f"--topology {topology}: the TPU compiler refuses it ({in_one_line(error)}): choose "
            "another grid"
        ) from None
    return list(description.devices)


@dataclass(frozen=True, kw_only=True)
class EstimateOf:
    """What an estimate is of."""

    title: str
    topology: str
    chip: Chip
    mesh: "Mesh"
    images: int  # that one call works on
    steps: int  # of the program's loop, to make them; 0 without a loop


def compile_and_say(
    lower: Callable[[], Any],
    estimate_of: EstimateOf,
    *,
    hlo_file: Path | None = None,
    json_file: Path | None = None,
) -> None:
    """Compile a program and print what it would need and cost.

    Args:
        lower: traces the program.
        hlo_file: to write the compiled program to.
        json_file: to write all figures to.

    Raises:
        UnfitEnvironmentError: it does not fit into a chip's memory.
    """
    chip = estimate_of.chip
    began = time.perf_counter()
    with stopping_at_once(f"tracing {estimate_of.title}"):
        lowered = lower()
    traced = time.perf_counter()
    try:
        with stopping_at_once(f"compiling {estimate_of.title}"):
            compiled = lowered.compile()
    except Exception as error:
        if OUT_OF_DEVICE_MEMORY not in str(error):
            raise
        raise UnfitEnvironmentError(
            f"{estimate_of.title} does not fit into the {chip.memory_bytes / 1e9:.0f} GB of a "
            f"{chip.name} ({in_one_line(error)}): ask for fewer pictures at once, or more chips"
        ) from None
    compile_seconds = time.perf_counter() - traced
    text = compiled.as_text()
    if hlo_file is not None:
        write_text_whole(hlo_file, text)
    content = _figures(estimate_of, text, tpu_estimate.memory_of(compiled)) | {
        "trace_seconds": traced - began,
        "compile_seconds": compile_seconds,
    }
    if json_file is not None:
        write_text_whole(json_file, json.dumps(content, indent=2, sort_keys=True) + "\n")
    messages.say(in_words(content))


def _figures(estimate_of: EstimateOf, hlo: str, memory: dict[str, int]) -> dict[str, Any]:
    """A compiled program's figures by their names, from its text and `memory_of` it."""
    chip, steps = estimate_of.chip, estimate_of.steps
    once, step = tpu_estimate.estimate(hlo, chip)
    grid = [tuple(getattr(d, "coords", (d.id,))) for d in estimate_of.mesh.devices.flat]
    scheduled = tpu_schedule.schedule(hlo, chip, grid, LATENCIES)
    by_latency = dict(zip(LATENCIES, scheduled, strict=True))
    by_schedule = by_latency[tpu_estimate.COLLECTIVE_LATENCY]
    seconds = by_schedule[0].total_seconds + steps * by_schedule[1].total_seconds
    return {
        "title": estimate_of.title,
        "topology": estimate_of.topology,
        "chips": estimate_of.mesh.size,
        "mesh": name_of(estimate_of.mesh),
        "images": estimate_of.images,
        "steps": steps,
        "memory_bytes": memory,
        "chip_memory_bytes": chip.memory_bytes,
        "fits": memory["total"] <= chip.memory_bytes,
        "once": once.as_json() | {"scheduled": by_schedule[0].as_json()},
        "step": step.as_json() | {"scheduled": by_schedule[1].as_json()},
        "seconds_by_latency": {  # microseconds of a collective → seconds of the step, or of all
            f"{1e6 * latency:g}": found[1 if steps else 0].total_seconds
            for latency, found in by_latency.items()
        },
        "images_per_second": estimate_of.images / seconds,
    }


def in_words(content: Mapping[str, Any]) -> str:
    """An estimate as the table that is printed."""
    memory = content["memory_bytes"]
    lines = [
        f"{content['title']}: an estimate without a TPU (docs/tpu.md has the method)",
        f"  topology   {content['topology']}, {content['chips']} chip(s), mesh {content['mesh']}, "
        f"{content['images']} image(s)",
        f"  memory     {memory['total'] / 1e9:.2f} of {content['chip_memory_bytes'] / 1e9:.0f} GB "
        f"a chip (weights and inputs {memory['arguments'] / 1e9:.2f}, temporaries "
        f"{memory['temporaries'] / 1e9:.2f}){'' if content['fits'] else ': DOES NOT FIT'}",
    ]
    if content["steps"]:
        lines += _part_in_words("one step", content["step"])
        once = content["once"]
        lines.append(
            f"  before     {1e3 * once['scheduled']['total_seconds']:.2f} ms once, "
            f"{once['cycles'] / 1e6:.1f} M cycles"
        )
    else:
        lines += _part_in_words("all", content["once"])
    count = f" with {content['steps']} steps" if content["steps"] else ""
    others = ", ".join(
        f"{1e3 * seconds:.2f} ms with {name} µs"
        for name, seconds in content["seconds_by_latency"].items()
    )
    lines += [
        f"  latency    {others} for a collective",
        f"  speed      {content['images_per_second']:.2f} images/s{count}",
        f"  compiled   in {content['compile_seconds']:.0f} s, traced in "
        f"{content['trace_seconds']:.0f} s",
    ]
    return "\n".join(lines)


def _part_in_words(name: str, estimate: Mapping[str, Any]) -> list[str]:
    scheduled = estimate["scheduled"]
    total = scheduled["total_seconds"]
    lines = [
        f"  {name:10} {1e3 * total:.2f} ms by its schedule, a plain sum of "
        f"{1e3 * estimate['total_seconds']:.2f} ms; {estimate['cycles'] / 1e6:.1f} M cycles in "
        f"{estimate['operations']} operations, kernels among them "
        f"{estimate['kernel_cycles'] / 1e6:.1f} M"
    ]
    moved = ", ".join(
        f"{count} {kind} ({estimate['collective_bytes'][kind] / 1e6:.1f} MB)"
        for kind, count in sorted(estimate["collectives"].items())
    )
    hidden = f"besides {1e3 * scheduled['hidden']:.2f} ms hidden: {moved}"
    for part, seconds in scheduled["seconds"].items():
        share = seconds / total if total else 0.0
        more = f"  {hidden}" if part == "collectives" and moved else ""
        if seconds or part in tpu_estimate.PARTS:
            lines.append(f"    {part:12} {1e3 * seconds:7.2f} ms {share:6.1%}{more}")
    return lines
