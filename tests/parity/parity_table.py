"""Collect what parity tests measured, and write docs/parity.md from it."""

from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

INTRODUCTION = """# Parity with diffusers

Latents and pictures by the three stages beside those by the installed diffusers pipeline, on tiny
checkpoints of real components with random weights: float32 on the CPU, 64×64 pixels (their native
size), 12 steps unless the column says otherwise, guidance 7.5, two prompts, the same generators.

A cell holds the relative difference of the latents (must be below 1e-4) and the largest difference
of a pixel out of 255 (must be at most 2); or what diffusers itself says, in which case stage 2 ends
with exit code 2 where diffusers raises and 4 where its latents are not finite. A dash: the class
has no such setting. Runs from latents and from pictures have the same steps; where diffusers begins
a schedule in its middle wrongly (its LMS takes its order from the place in the schedule, its PNDM
loses a step), the cell says how far its latents are from ours, which
`tests/sampling/test_step_range.py` holds against the definition.

Made by `make parity`, with {versions}.
"""


@dataclass
class ParityTable:
    """Cells by section, row and column, in the order in which they came."""

    sections: dict[str, dict[str, dict[str, str]]] = field(default_factory=dict)

    def add(self, section: str, row: str, column: str, cell: str) -> None:
        self.sections.setdefault(section, {}).setdefault(row, {})[column] = cell

    def write(self, path: Path) -> None:
        """Write everything as Markdown."""
        packages = ("diffusers", "torch", "jax", "torchax")
        versions = ", ".join(f"{package} {version(package)}" for package in packages)
        parts = [INTRODUCTION.format(versions=versions)]
        for section, rows in self.sections.items():
            columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
            lines = [["scheduler", *columns], ["---"] * (1 + len(columns))]
            lines += [[row, *(cells.get(c, "") for c in columns)] for row, cells in rows.items()]
            table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
            parts.append(f"## {section}\n\n{table}\n")
        path.write_text("\n".join(parts), encoding="utf-8")
