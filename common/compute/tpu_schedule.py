"""Estimate a compiled TPU program's time by its schedule: what waits for what.

The compiler's text is in the order in which a chip begins its operations. They take as long as
`tpu_estimate` says, one after the other; what moves meanwhile costs what is left of it where it is
waited for:

- a collective takes its bytes over the links that it really has (`links`) and a latency. One that
  is begun and ended apart, by a start and a done or within the fusions beside which it runs, moves
  from its start on; collectives follow each other on the links;
- what the compiler fetches from the chip's memory ahead of its use takes its bytes at the memory's
  rate, one after the other;
- a kernel has a start besides, as every operation in the compiler's model;
- a step takes no less than the memory needs for all that it reads of its weights, once.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from common.compute.chips import Chip
from common.compute.links import Position, fullest_link
from common.compute.tpu_estimate import (
    CALLED,
    CALLS,
    COLLECTIVES,
    ITEM_BYTES,
    PARTS,
    Instruction,
    bytes_in,
    kernel_seconds,
    moved_bytes,
    parse,
    part_of,
    shapes_in,
)

START_CYCLES = 2100  # of a kernel: those that the compiler gives the smallest operation
FETCH, MEMORY = "fetching", "memory"  # further parts: waits for what is fetched, and for all of it
FETCHES = ("copy", "slice")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))?\s*\{([^}]*)\}")
_RANGE = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?")
_AXIS = re.compile(r"'(\w+)'=(\d+)")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}")


@dataclass
class Scheduled:
    """A part of a program by its schedule, on one of its chips."""

    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys((*PARTS, FETCH, MEMORY), 0.0)
    )
    hidden: float = 0.0  # seconds of collectives that run beside other operations

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    def as_json(self) -> dict[str, Any]:
        """All figures by their names."""
        return asdict(self) | {"total_seconds": self.total_seconds}


def schedule(
    hlo: str, chip: Chip, grid: Sequence[Position], latencies: Sequence[float]
) -> list[tuple[Scheduled, Scheduled]]:
    """Estimate a program from its optimized HLO text: what is done once, and one step of its loop.

    Args:
        grid: where each device of the program is.
        latencies: seconds of a collective besides its bytes; for each there is an estimate.
    """
    computations, entry = parse(hlo)
    found = []
    for latency in latencies:
        once, step = _walked(computations, entry, chip, grid, latency), Scheduled()
        for body in once.loops:
            of_body = _walked(computations, body, chip, grid, latency).found
            step.hidden += of_body.hidden
            for part, seconds in of_body.seconds.items():
                step.seconds[part] += seconds
        found.append((once.found, step))
    return found


def _walked(
    computations: dict[str, list[Instruction]],
    name: str,
    chip: Chip,
    grid: Sequence[Position],
    latency: float,
) -> "_Walk":
    """A walk through a computation in the order of its operations."""
    walk = _Walk(computations, chip, grid, latency)
    walk.through(name)
    floor = _weights(computations[name]) / chip.memory_rate
    walk.found.seconds[MEMORY] = max(0.0, floor - walk.found.total_seconds)
    return walk


class _Walk:
    """How far a chip is, in seconds."""

    def __init__(
        self,
        computations: dict[str, list[Instruction]],
        chip: Chip,
        grid: Sequence[Position],
        latency: float,
    ) -> None:
        self.found = Scheduled()
        self._computations, self._chip = computations, chip
        self._grid, self._latency = grid, latency
        self._now = self._links_free = self._memory_free = 0.0
        self._ready: dict[str, float] = {}  # name or channel of what moves → when it is there
        self.loops: list[str] = []  # the bodies of those whose length is not known

    def through(self, name: str) -> None:
        """Do a computation once."""
        types = {i.name: i.result for i in self._computations[name]}
        last = {
            channel: each.name
            for each in self._computations[name]
            for channel, _ in self._carried_by(each)
        }
        for each in self._computations[name]:
            kind, _, phase = each.opcode.rpartition("-")
            if each.opcode == "while":
                self._repeat(each)
            elif each.opcode in CALLS:
                for key in CALLED:
                    if (called := each.text_of(key)) in self._computations:
                        self.through(called)
            elif each.opcode in COLLECTIVES:
                self._begin(each.name, each.opcode, each)
                self._wait("collectives", each.name)
            elif phase == "start" and kind in COLLECTIVES:
                self._begin(each.name, kind, each)
            elif phase == "start" and kind in FETCHES:
                self._fetch(each)
            elif phase == "done":
                self._wait("collectives" if kind in COLLECTIVES else FETCH, each.operands[0])
            else:
                for channel, inner in self._carried_by(each):
                    if channel not in self._ready:
                        self._begin(channel, inner.opcode.removesuffix("-start"), inner)
                self._do(each, types)
                for channel, _ in self._carried_by(each):
                    if last[channel] == each.name:
                        self._wait("collectives", channel)

    def _repeat(self, loop: Instruction) -> None:
        """A loop whose count is known; another one is estimated apart."""
        trips, body = loop.trips, loop.text_of("body")
        if body is not None and trips is None:
            self.loops.append(body)
        elif body is not None:
            for _ in range(trips or 0):
                self._ready.clear()
                self.through(body)

    def _carried_by(self, fusion: Instruction) -> Iterator[tuple[str, Instruction]]:
        """The collectives that run beside a fusion, by their channels."""
        if fusion.opcode == "fusion":
            for inner in self._computations.get(fusion.text_of("calls") or "", ()):
                channel = re.search(r"\bchannel_id=(\d+)", inner.line)
                if channel is not None and inner.opcode.removesuffix("-start") in COLLECTIVES:
                    yield channel[1], inner

    def _do(self, each: Instruction, types: dict[str, str]) -> None:
        if each.opcode == "custom-call" and "tpu_custom_call" in each.line:
            started = START_CYCLES / self._chip.clock
            seconds = started + kernel_seconds(each, types, self._chip)
        else:
            seconds = each.cycles / self._chip.clock
        if seconds:
            self._now += seconds
            self.found.seconds[part_of(each)] += seconds

    def _begin(self, name: str, kind: str, collective: Instruction) -> None:
        """Let a collective move from now on, when those before it have moved."""
        groups = groups_of(collective.line, len(self._grid))
        size = moved_bytes(collective)
        if kind == "reduce-scatter":
            size *= len(groups[0])
        moving = fullest_link(kind, groups, size, self._grid) / self._chip.rate_of_a_link
        began = max(self._now, self._links_free)
        self._links_free = began + moving
        self._ready[name] = began + moving + self._latency
        self.found.hidden += moving + self._latency

    def _fetch(self, each: Instruction) -> None:
        """Let something come from the memory, or go there."""
        arrays = [math.prod(s) * ITEM_BYTES[k] for k, s in shapes_in(each.result)]
        size = min(arrays[:2])  # what is copied twice, or a slice beside what it is of
        began = max(self._now, self._memory_free)
        self._memory_free = self._ready[each.name] = began + size / self._chip.memory_rate

    def _wait(self, part: str, name: str) -> None:
        waited = max(0.0, self._ready.pop(name, 0.0) - self._now)
        self._now += waited
        self.found.seconds[part] += waited
        if part == "collectives":
            self.found.hidden -= waited


def _weights(body: Sequence[Instruction]) -> int:
    """The bytes that a loop uses and does not change; of an entry, those that it is given and uses.

    What a tuple alone has is for a loop, or handed on.
    """
    given = {each.name: each for each in body if each.opcode == "parameter"}
    elements = {
        each.name: each
        for each in body
        if each.opcode == "get-tuple-element" and each.operands[0] in given
    }
    used, handed_on = set[str](), set[str]()
    for each in body:
        names = {*each.operands}
        if each.opcode == "tuple":
            handed_on |= names
        elif each.name not in elements:
            used |= names
    of_loop = elements.keys() & handed_on
    return sum(
        bytes_in(source[name].result)
        for source in (given, elements)
        for name in used & source.keys()
        if name in of_loop or name not in elements
    )


def groups_of(line: str, devices: int) -> list[list[int]]:
    """The groups of devices of a collective, or the pairs of a permutation.

    In the three forms that XLA writes: listed, as a reshaped and transposed range, or as axes of a
    mesh; where it writes none, all are one.

    Args:
        devices: how many the program is for.

    Raises:
        ValueError: it is another one.
    """
    if found := _MESH.search(line):
        sides = {name: int(size) for name, size in _AXIS.findall(found[1])}
        names = re.findall(r"'(\w+)'", found[3])
        if ":" in found[3] or not names:
            raise ValueError(f"parts of axes are not understood: {found[0]}")
        within = [k for k, name in enumerate(sides) if name in names]
        order = [*(k for k in range(len(sides)) if k not in within), *within]
        count = math.prod(list(sides.values())[k] for k in within)
        return _groups(_devices(found[2]), [*sides.values()], order, count)
    if found := _IOTA.search(line):
        shape = [int(each) for each in found[1].split(",")]
        return _groups(_devices(line[found.end(1) + 3 : found.end()]), None, None, shape[-1])
    if found := _LISTED.search(line):
        return [[int(n) for n in group.split(",")] for group in re.findall(r"[\d,]*\d", found[1])]
    if "replica_groups=" not in line.replace("replica_groups={}", ""):
        return [[*range(devices)]]
    raise ValueError(f"groups of devices that are not understood: {line[:300]}")


def _devices(text: str | None) -> Any:
    """Numbers as XLA writes them: those of a range in some shape and order, or a list."""
    if text is None:
        return None
    if found := _RANGE.search(text):
        sides = [int(each) for each in found[1].split(",")]
        order = [int(each) for each in found[2].split(",")] if found[2] else None
        return np.arange(math.prod(sides)).reshape(sides).transpose(order).reshape(-1)
    return np.array([int(each) for each in re.findall(r"\d+", text)])


def _groups(
    devices: Any, sides: list[int] | None, order: list[int] | None, count: int
) -> list[list[int]]:
    """Devices in a shape, its axes in another order, divided into groups of as many."""
    if sides is not None:
        devices = np.arange(math.prod(sides)) if devices is None else devices
        devices = devices.reshape(sides).transpose(order)
    found: list[list[int]] = devices.reshape(-1, count).tolist()
    return found
