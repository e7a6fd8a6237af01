"""Compile full-size SDXL for TPUs that are not there, and print the tables of docs/tpu.md.

    tools/set_up.sh tpu
    python benchmarks/tpu_estimates.py                  # all rows: some two hours on two cores
    python benchmarks/tpu_estimates.py --row v6e-8      # one of them

Each row is one run of a stage with `--topology`. Its figures are kept as
stage_outputs/tpu_estimates/ROW.json and not compiled again while they are there; a row that was
never compiled is left out of the table.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

PROJECT_DIR = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT_DIR))

import typer

FOLDER = PROJECT_DIR / "stage_outputs" / "tpu_estimates"
UNET = "stage2_unet.py"
VAE = "stage3_vae_decoder.py"
ENCODER = "stage0_image_encoder.py"
NINE_CHANNELS = ("--model_id", str(PROJECT_DIR / "models" / "sdxl_inpainting"))
REFINER = ("--model_id", str(PROJECT_DIR / "models" / "sdxl_refiner"))
TORCHAX = ("--operations", "torchax")
# Row → stage, topology, its other flags.
ROWS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "the older split": (UNET, "v6e:2x4", ("--mesh", "tensor=8", *TORCHAX)),
    "torchax's operations": (UNET, "v6e:2x4", TORCHAX),
    "v6e-8": (UNET, "v6e:2x4", ()),
    "v6e-4": (UNET, "v6e:2x2", ()),
    "v6e-1": (UNET, "v6e:1x1", ()),
    "v5e-8": (UNET, "v5e:2x4", ()),
    "v5e-4": (UNET, "v5e:2x2", ()),
    "v6e-8, eight images": (UNET, "v6e:2x4", ("--num_images_per_prompt", "8")),
    "v6e-8, 1536×640": (UNET, "v6e:2x4", ("--width", "1536", "--height", "640")),
    "v6e-8, inpainting by nine channels": (UNET, "v6e:2x4", NINE_CHANNELS),
    "v6e-8, refiner": (UNET, "v6e:2x4", REFINER),
    "VAE 1024², v6e-1": (VAE, "v6e:1x1", ("--pictures_shape", "1,1024,1024")),
    "VAE 1024², v6e-8": (VAE, "v6e:2x4", ("--pictures_shape", "1,1024,1024")),
    "VAE 2048², v6e-1": (VAE, "v6e:1x1", ("--pictures_shape", "1,2048,2048")),
    "VAE 2048², v6e-8": (VAE, "v6e:2x4", ("--pictures_shape", "1,2048,2048")),
    "encoder 1024², v6e-8": (ENCODER, "v6e:2x4", ("--pictures_shape", "1,1024,1024")),
}


def figures_file(folder: Path, row: str) -> Path:
    """Where a row's figures are kept."""
    return folder / f"{row.replace(' ', '_')}.json"


def command_of(row: str, model_id: str, folder: Path) -> list[str]:
    """What makes a row's figures."""
    stage, topology, flags = ROWS[row]
    return [
        *(sys.executable, str(PROJECT_DIR / "stages" / stage), "--topology", topology),
        *("--model_id", model_id, *flags, "--json", str(figures_file(folder, row))),
    ]


def table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown, a line for each row that has figures."""
    lines = [
        "| row | mesh | cycles, kernels counted | plain sum | by schedule (with 1, 10 µs) "
        "| of it collectives, besides hidden | memory a chip | images/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row, figures in found.items():
        part = figures["step"] if figures["steps"] else figures["once"]
        moved = ", ".join(f"{count} {kind}s" for kind, count in sorted(part["collectives"].items()))
        scheduled = part["scheduled"]
        left, hidden = scheduled["seconds"]["collectives"], scheduled["hidden"]
        collectives = f"{1e3 * left:.2f}, {1e3 * hidden:.2f} ms: {moved}" if moved else "none"
        others = " to ".join(f"{1e3 * figures['seconds_by_latency'][k]:.2f}" for k in ("1", "10"))
        speed = f"{figures['images_per_second']:.2f}"
        memory = figures["memory_bytes"]["total"] / 1e9
        lines.append(
            f"| {row} | `{figures['mesh']}` | {part['cycles'] / 1e6:.1f} M "
            f"| {1e3 * part['total_seconds']:.2f} ms "
            f"| {1e3 * scheduled['total_seconds']:.2f} ms ({others}) | {collectives} "
            f"| {memory:.2f} GB | {speed} |"
        )
    return "\n".join(lines)


def main(
    row: Annotated[list[str] | None, typer.Option("--row", help="Rows to compile. [all]")] = None,
    model_id: Annotated[str, typer.Option("--model_id", help="Checkpoint.")] = "models/sdxl_base",
    folder: Annotated[Path, typer.Option("--folder", help="Where figures are kept.")] = FOLDER,
    force: Annotated[bool, typer.Option("--force", help="Compile again what is there.")] = False,
) -> None:
    """Compile what has no figures yet, and print the table."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in row or ROWS:
        if name not in ROWS:
            raise typer.BadParameter(f"{name} is none of: {', '.join(ROWS)}")
        if force or not figures_file(folder, name).exists():
            subprocess.run(command_of(name, model_id, folder), check=True)
    files = {name: figures_file(folder, name) for name in ROWS}
    there = {name: file for name, file in files.items() if file.exists()}
    print(table({name: json.loads(file.read_text()) for name, file in there.items()}))


if __name__ == "__main__":
    typer.run(main)
