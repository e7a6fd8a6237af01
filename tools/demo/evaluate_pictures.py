"""Measure what the demo checkpoint makes of pictures: how much it keeps, and what it paints anew.

    python tools/demo/evaluate_pictures.py          # 50 drawn pictures, some minutes on a CPU

Drawn pictures of held-out scenes begin the runs. Image to image is asked for another shape at
several strengths, by a prompt that leaves all else open; inpainting for the same scene in another
colour, where a box around the figure is the mask. `picture_analysis` reads the results. Writes
evaluation_pictures.md into the output folder, and the runs beside it.
"""

import random
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

PROJECT_DIR = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(PROJECT_DIR))

import numpy as np
import typer
from PIL import Image
from rich.console import Console

from tools.demo.drawn_shapes import COLORS, SHAPES, Scene, draw_scene, evaluation_prompt
from tools.demo.evaluate import (
    ATTRIBUTES,
    FIRST_SEED,
    Prompt,
    Table,
    asked_attributes,
    choose_scenes,
    make_pictures,
)
from tools.demo.picture_analysis import analyse_picture

STRENGTHS = (0.3, 0.6, 0.9)
DRAWN_SEED = 5  # of the drawn pictures and of the colours asked for
BORDER = 6  # pixels around the figure that are masked as well
FIGURE_FROM = 40  # of 255: what differs so much from the picture's corner is the figure


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A picture to begin with, and what it shows."""

    scene: Scene
    pixels: np.ndarray  # [128, 128, 3] uint8

    @property
    def mask(self) -> np.ndarray:
        """A box around its figure [128, 128] bool."""
        apart = np.abs(self.pixels.astype(int) - self.pixels[0, 0]).max(-1) > FIGURE_FROM
        rows, columns = (np.flatnonzero(apart.any(axis)) for axis in (1, 0))
        box = np.zeros(apart.shape, bool)
        top, left = (max(0, found[0] - BORDER) for found in (rows, columns))
        box[top : rows[-1] + BORDER + 1, left : columns[-1] + BORDER + 1] = True
        return box


def draw_pictures(count: int) -> list[Drawn]:
    """Pictures of held-out scenes, each with one figure."""
    rng = random.Random(DRAWN_SEED)
    return [Drawn(scene=scene, pixels=draw_scene(scene, rng)) for scene in choose_scenes(count)]


def another_shape(scene: Scene, rng: random.Random) -> str:
    """A prompt for a shape that is not the scene's."""
    return f"a {rng.choice([shape for shape in SHAPES if shape != scene.figures[0].shape])}"


def in_another_color(scene: Scene, rng: random.Random) -> Scene:
    """The scene with its figure in a colour that is neither its own nor the background's."""
    (figure,) = scene.figures
    color = rng.choice([name for name in COLORS if name not in (figure.color, scene.background)])
    return replace(scene, figures=(replace(figure, color=color),))


def save_inputs(drawn: Sequence[Drawn], folder: Path) -> list[dict[str, str]]:
    """Write pictures and masks. Returns what a line of a prompts file says of each."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, each in enumerate(drawn):
        image, mask = (folder / f"{kind}_{number:03d}.png" for kind in ("picture", "mask"))
        Image.fromarray(each.pixels).save(image)
        Image.fromarray(np.where(each.mask, 255, 0).astype(np.uint8)).save(mask)
        lines.append({"image": str(image), "mask_image": str(mask)})
    return lines


def kept_attributes(drawn: Sequence[Drawn], results: Sequence[np.ndarray]) -> dict[str, int]:
    """How many results still show each attribute of the picture that they began with."""
    kept = dict.fromkeys(ATTRIBUTES, 0)
    for each, result in zip(drawn, results, strict=True):
        reading = analyse_picture(result)
        for name, value in asked_attributes(each.scene).items():
            kept[name] += getattr(reading, name) == value
    return kept


def measure_strengths(
    drawn: Sequence[Drawn], images: Sequence[str], output_dir: Path, flags: Sequence[str]
) -> Table:
    """What image to image keeps of pictures, at each strength."""
    rng = random.Random(DRAWN_SEED)
    prompts = [
        Prompt(prompt=another_shape(each.scene, rng), seed=FIRST_SEED + number, image=image)
        for number, (each, image) in enumerate(zip(drawn, images, strict=True))
    ]
    rows = []
    for strength in STRENGTHS:
        results = make_pictures(
            prompts,
            output_dir=output_dir / f"strength_{strength:g}",
            flags=[*flags, f"--strength={strength}"],
        )
        kept = kept_attributes(drawn, results)
        shares = [
            100 * count / len(drawn) for count in (*kept.values(), sum(kept.values()) / len(kept))
        ]
        changed = np.mean(
            [
                np.abs(each.pixels.astype(int) - r).mean()
                for each, r in zip(drawn, results, strict=True)
            ]
        )
        cells = [f"{strength:g}", *(f"{share:.1f}" for share in shares), f"{changed:.1f}"]
        rows.append(cells)
    return Table(
        title=f"Image to image to another shape, {len(drawn)} pictures: what is kept in %",
        columns=["strength", *ATTRIBUTES.values(), "of all", "pixels changed by"],
        rows=rows,
    )


def measure_inpainting(
    drawn: Sequence[Drawn],
    inputs: Sequence[dict[str, str]],
    output_dir: Path,
    flags: Sequence[str],
) -> Table:
    """Whether inpainted figures take the colour asked for, and the rest stays."""
    rng = random.Random(DRAWN_SEED)
    asked = [in_another_color(each.scene, rng) for each in drawn]
    prompts = [
        Prompt(prompt=evaluation_prompt(scene), seed=FIRST_SEED + number, **given)
        for number, (scene, given) in enumerate(zip(asked, inputs, strict=True))
    ]
    results = make_pictures(
        prompts, output_dir=output_dir / "inpainting", flags=[*flags, "--keep_unmasked"]
    )
    right = sum(
        analyse_picture(result).color == scene.figures[0].color
        for result, scene in zip(results, asked, strict=True)
    )
    outside = max(
        int(np.abs(each.pixels.astype(int) - result)[~each.mask].max())
        for each, result in zip(drawn, results, strict=True)
    )
    share = 100 * right / len(drawn)
    return Table(
        title=f"Inpainting, {len(drawn)} pictures",
        columns=["the colour asked for, in %", "most that a pixel outside the mask changed"],
        rows=[[f"{share:.1f}", str(outside)]],
    )


def main(
    pictures: Annotated[int, typer.Option("--pictures", help="How many.", min=1)] = 50,
    num_inference_steps: Annotated[
        int, typer.Option("--num_inference_steps", help="Denoising steps.", min=1)
    ] = 20,
    output_dir: Annotated[
        Path, typer.Option("--output_dir", help="Folder of the pictures and the results.")
    ] = Path("stage_outputs/evaluation_pictures"),
) -> None:
    """Begin runs with drawn pictures, and read what is kept and what is painted."""
    flags = [f"--num_inference_steps={num_inference_steps}", "--guidance_scale=5.0"]
    drawn = draw_pictures(pictures)
    inputs = save_inputs(drawn, output_dir / "inputs")
    images = [given["image"] for given in inputs]
    tables = [
        measure_strengths(drawn, images, output_dir, flags),
        measure_inpainting(drawn, inputs, output_dir, flags),
    ]
    command = shlex.join(["python", "tools/demo/evaluate_pictures.py", *sys.argv[1:]])
    text = f"    {command}\n\n" + "\n".join(table.to_markdown() for table in tables)
    (output_dir / "evaluation_pictures.md").write_text(text, encoding="utf-8")
    console = Console()
    for table in tables:
        console.print(table.to_rich())


if __name__ == "__main__":
    typer.run(main)
