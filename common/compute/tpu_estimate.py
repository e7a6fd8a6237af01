"""Estimate a compiled TPU program's time from its HLO text, without a TPU.

The compiler writes its own cost model's `estimated_cycles` on nearly every operation. The method,
the same for every program so that they compare:

- operations: the compiler's cycles, the body of a `while` times its known trip count, at the
  chip's clock;
- a custom kernel: the largest of FLOPs / (peak · head size / 256, at most the peak), bytes / memory
  rate and exponentials / (2048 a cycle), whatever a kernel says of itself;
- a collective: bytes / link rate plus 5 µs, not overlapped with anything (`tpu_schedule` sees what
  runs beside it).

A loop whose trip count is not known is the one over the denoising steps: its body is estimated
once and apart from what comes before it.

The compiler's cycles are a model: estimates are for comparing programs.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from common.compute.chips import Chip

COLLECTIVE_LATENCY = 5e-6  # seconds

EXPONENTIALS_PER_CYCLE = 2048

PARTS = ("convolution", "attention", "linear", "norm", "copies", "other", "collectives")

ITEM_BYTES = {
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1),
    **dict.fromkeys(("bf16", "f16", "s16", "u16"), 2),
    **dict.fromkeys(("f32", "s32", "u32"), 4),
    **dict.fromkeys(("f64", "s64", "u64"), 8),
}

COLLECTIVES = ("all-gather", "all-reduce", "collective-permute", "all-to-all", "reduce-scatter")

CALLS = ("call", "async-start", "conditional")
CALLED = ("to_apply", "calls", "true_computation", "false_computation")

MOVING = ("copy", "pad", "transpose", "bitcast", "reshape", "slice", "concatenate", "broadcast")


@dataclass
class Estimate:
    """A part of a program, on one of its chips."""

    chip: str
    cycles: float = 0.0  # of operations that the compiler gave cycles for, and of kernels
    kernel_cycles: float = 0.0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    collectives: dict[str, int] = field(default_factory=dict)
    collective_bytes: dict[str, int] = field(default_factory=dict)
    operations: int = 0

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    def as_json(self) -> dict[str, Any]:
        """All figures by their names."""
        return asdict(self) | {"total_seconds": self.total_seconds}


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line of an HLO computation."""

    name: str
    opcode: str
    result: str  # the shape or shapes, as written
    line: str

    def text_of(self, key: str) -> str | None:
        """The computation that `key=` names."""
        match = re.search(rf"\b{key}=%?([\w.-]+)", self.line)
        return match[1] if match else None

    @property
    def operands(self) -> list[str]:
        """The names of what it is given."""
        of_call = self.line.split(f" {self.opcode}(", 1)[1].split(")", 1)[0]
        return re.findall(r"%([\w.-]+)", of_call)

    @property
    def trips(self) -> int | None:
        """How often a loop goes round, where that is known."""
        match = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', self.line)
        return int(match[1]) if match else None

    @property
    def op_name(self) -> str:
        """The path of jax and module scopes that the operation comes from."""
        match = re.search(r'op_name="([^"]*)"', self.line)
        return match[1] if match else ""

    @property
    def cycles(self) -> int:
        match = re.search(r'"estimated_cycles":"(\d+)"', self.line)
        return int(match[1]) if match else 0


INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<result>\(.*?\)|\S+) (?P<opcode>[\w-]+)\("
)

COMPUTATION = re.compile(r"^(ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")

SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")


def parse(hlo: str) -> tuple[dict[str, list[Instruction]], str]:
    """The instructions of each computation, and the name of the entry."""
    computations: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    entry = ""
    for line in hlo.splitlines():
        if start := COMPUTATION.match(line):
            current = computations.setdefault(start["name"], [])
            entry = start["name"] if start[1] else entry
        elif found := INSTRUCTION.match(line):
            current.append(Instruction(found["name"], found["opcode"], found["result"], line))
    return computations, entry


def shapes_in(text: str) -> Iterator[tuple[str, list[int]]]:
    """Every array type in a piece of HLO: its element type and dimensions."""
    for kind, dimensions in SHAPE.findall(text):
        if kind in ITEM_BYTES:
            yield kind, [int(size) for size in dimensions.split(",") if size]


def bytes_in(text: str) -> int:
    """The bytes of all arrays in a piece of HLO."""
    return sum(math.prod(shape) * ITEM_BYTES[kind] for kind, shape in shapes_in(text))


def estimate(hlo: str, chip: Chip) -> tuple[Estimate, Estimate]:
    """Estimate a program from its optimized HLO text: what is done once, and one step of its loop.

    A program without a loop of unknown length has an empty step.
    """
    computations, entry = parse(hlo)
    once, step = Estimate(chip.name), Estimate(chip.name)
    fused: set[str] = set()
    for body in _add_computation(computations, entry, 1, chip, once, fused):
        _add_computation(computations, body, 1, chip, step, fused)
    return once, step


def _add_computation(
    computations: dict[str, list[Instruction]],
    name: str,
    times: int,
    chip: Chip,
    result: Estimate,
    fused: set[str],
) -> list[str]:
    """Add a computation to a result. Returns the bodies of loops whose length is not known.

    Args:
        fused: channels of collectives within fusions that were added. The compiler for v5e writes
            one into the fusions that start it, that compute meanwhile and that end it.
    """
    loops: list[str] = []
    types = {i.name: i.result for i in computations[name]}
    for instruction in computations[name]:
        if instruction.opcode == "while":
            trips, body = instruction.trips, instruction.text_of("body")
            if trips is None and body is not None:
                loops.append(body)
            elif trips is not None and body in computations:
                loops += _add_computation(computations, body, times * trips, chip, result, fused)
        elif instruction.opcode in CALLS:
            for key in CALLED:
                called = instruction.text_of(key)
                if called in computations:
                    loops += _add_computation(computations, called, times, chip, result, fused)
        else:
            _add_instruction(instruction, types, times, chip, result)
        if instruction.opcode == "fusion":
            for inner in computations.get(instruction.text_of("calls") or "", ()):
                channel = re.search(r"\bchannel_id=(\d+)", inner.line)
                is_collective = inner.opcode.removesuffix("-start") in COLLECTIVES
                if is_collective and channel is not None and channel[1] not in fused:
                    fused.add(channel[1])
                    _add_instruction(inner, types, times, chip, result)
    return loops


def _add_instruction(
    instruction: Instruction, types: dict[str, str], times: int, chip: Chip, result: Estimate
) -> None:
    kind = instruction.opcode.removesuffix("-start")
    if kind in COLLECTIVES:
        size = moved_bytes(instruction)
        result.collectives[kind] = result.collectives.get(kind, 0) + times
        result.collective_bytes[kind] = result.collective_bytes.get(kind, 0) + times * size
        result.seconds["collectives"] += times * (size / chip.link_rate + COLLECTIVE_LATENCY)
        return
    if instruction.opcode == "custom-call" and "tpu_custom_call" in instruction.line:
        seconds = kernel_seconds(instruction, types, chip)
        cycles = seconds * chip.clock
        result.kernel_cycles += times * cycles
    else:
        cycles = instruction.cycles
        seconds = cycles / chip.clock
    if cycles:
        result.operations += times
        result.cycles += times * cycles
        result.seconds[part_of(instruction)] += times * seconds


def moved_bytes(instruction: Instruction) -> int:
    """The result of a collective; an asynchronous one's start holds operands as well."""
    if not instruction.opcode.endswith("-start"):
        return bytes_in(instruction.result)
    arrays = [math.prod(s) * ITEM_BYTES[k] for k, s in shapes_in(instruction.result)]
    count = len(instruction.operands)
    if instruction.opcode == "all-reduce-start":
        return sum(arrays)
    return sum(arrays[count : 2 * count])


def kernel_seconds(instruction: Instruction, types: dict[str, str], chip: Chip) -> float:
    """An attention kernel by its arithmetic, any other by the bytes that it moves."""
    inputs = [types.get(name, "") for name in instruction.operands]
    moved = bytes_in(instruction.result) + sum(bytes_in(text) for text in inputs)
    seconds = moved / chip.memory_rate
    pictures = [shape for text in inputs for _, shape in shapes_in(text) if len(shape) == 4]
    if "attention" in instruction.op_name and len(pictures) >= 3:
        (images, heads, queries, size), (_, _, keys, _) = pictures[:2]
        pairs = images * heads * queries * keys
        peak = chip.peak_flops * min(1.0, size / 256)
        seconds = max(
            seconds,
            4 * pairs * size / peak,
            pairs / EXPONENTIALS_PER_CYCLE / chip.clock,
        )
    return seconds


def part_of(instruction: Instruction) -> str:
    """Which part of a model an instruction belongs to, by the torch function that it came from."""
    name = instruction.op_name
    if instruction.opcode in MOVING or not name:
        return "copies"
    if "scaled_dot_product_attention" in name:
        return "attention"
    if "group_norm" in name or "layer_norm" in name:
        return "norm"
    if "conv2d" in name or "conv_general_dilated" in name:
        return "convolution"
    if "linear" in name or "dot_general" in name:
        return "linear"
    if name.rsplit("/", 1)[-1] in ("transpose", "reshape", "concatenate", "pad", "slice", "copy"):
        return "copies"
    return "other"


def memory_of(compiled: Any) -> dict[str, int]:
    """Bytes of a compiled program on one device: weights and inputs, results, temporaries."""
    analysis = compiled.memory_analysis()
    arguments, outputs = analysis.argument_size_in_bytes, analysis.output_size_in_bytes
    temporaries, aliased = analysis.temp_size_in_bytes, analysis.alias_size_in_bytes
    return {
        "arguments": arguments,
        "outputs": outputs,
        "temporaries": temporaries,
        "total": arguments + outputs + temporaries - aliased,
    }
