"""Measure how well the demo checkpoint does what its prompts say, on held-out combinations.

    python tools/demo/evaluate.py                   # 200 prompts, 3 pictures of each
    python tools/demo/evaluate.py --prompts 40 --seeds 1 --only_table

The pictures are made by the three stages, as anybody makes them, and read back by
`picture_analysis`. No training picture had any of the prompts' triples (shape, colour,
background). Writes into the output folder:

    evaluation.json, evaluation.md     every number; the tables, to be pasted into the model card
    evaluation_grid.png                the first 40 pictures
    table/, sharpness_*/, guidance_*/  the runs; what is fresh in them is not made again
"""

import dataclasses
import json
import random
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

PROJECT_DIR = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(PROJECT_DIR))

import numpy as np
import typer
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from common.files.stage_table import ENCODE, STAGES
from common.runs.generation import read_generation_config
from tools.demo.drawn_shapes import (
    POSITIONS,
    SIZES,
    Figure,
    Scene,
    all_triples,
    evaluation_prompt,
    is_held_out,
)
from tools.demo.picture_analysis import PictureReading, analyse_picture, sharpness

ATTRIBUTES = {
    "background": "background",
    "color": "colour",
    "shape": "shape",
    "size": "size",
    "position": "position",
}
SCENE_SEED = 0
# Prompts have seeds of their own, so that no two share a picture's noise.
FIRST_SEED, SEEDS_APART = 1000, 10
GUIDANCE_SCALES = (1.0, 5.0)
CONFUSIONS_SHOWN = 10
GRID_PICTURES, GRID_COLUMNS, GRID_GAP = 40, 8, 2

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One line of a prompts file."""

    prompt: str
    seed: int
    image: str | None = None  # to begin with
    mask_image: str | None = None


@dataclass(frozen=True, kw_only=True)
class Score:
    """How many pictures show what their scenes ask for."""

    pictures: int
    right: dict[str, int]  # of each attribute
    all_right: int
    confusions: Counter[tuple[str, str, str | None]]  # (attribute, asked for, seen)
    readings: list[PictureReading]

    def percentages(self) -> list[float]:
        """Of each attribute, then of all five in the same picture."""
        counts = [*self.right.values(), self.all_right]
        return [round(100 * count / self.pictures, 1) for count in counts]


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table to print and to paste."""

    title: str
    columns: list[str]
    rows: list[list[str]]

    def to_rich(self) -> RichTable:
        # Without vertical lines the widest table fits into 80 columns.
        table = RichTable(
            *self.columns,
            title=self.title,
            title_justify="left",
            box=box.SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
        )
        for row in self.rows:
            table.add_row(*row)
        return table

    def to_markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        body = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        return f"**{self.title}**\n\n{body}\n"


# --- what to draw -------------------------------------------------------------------------------


def choose_scenes(count: int, seed: int = SCENE_SEED) -> list[Scene]:
    """Pick scenes of held-out triples; triples, and pairs of size and position, come evenly."""
    rng = random.Random(seed)
    triples = _shuffled_cycles([triple for triple in all_triples() if is_held_out(*triple)], rng)
    places = _shuffled_cycles([(size, place) for size in SIZES for place in POSITIONS], rng)
    scenes = []
    for _ in range(count):
        (shape, color, background), (size, position) = next(triples), next(places)
        figure = Figure(shape=shape, color=color, size=size, position=position)
        scenes.append(Scene(background=background, figures=(figure,)))
    return scenes


def _shuffled_cycles(items: Sequence[Item], rng: random.Random) -> Iterator[Item]:
    """All items in a random order, again and again, each time in another one."""
    while True:
        yield from rng.sample(items, len(items))


def make_prompts(scenes: Sequence[Scene], first_words: str = "") -> list[Prompt]:
    """The scenes' plain captions, each with a seed of its own that depends on its place only."""
    return [
        Prompt(
            prompt=f"{first_words}{evaluation_prompt(scene)}",
            seed=FIRST_SEED + SEEDS_APART * index,
        )
        for index, scene in enumerate(scenes)
    ]


# --- the pipeline -------------------------------------------------------------------------------


def make_pictures(
    prompts: Sequence[Prompt],
    *,
    output_dir: Path,
    num_images_per_prompt: int = 1,
    flags: Sequence[str] = (),
) -> list[np.ndarray]:
    """Run the stages in `output_dir`, prompt-major. Returns pictures [H, W, 3] uint8.

    Args:
        flags: further flags of stage 1, which settles the settings of the whole run.

    Raises:
        SystemExit: a stage failed; with its exit code.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    prompts_file = output_dir / "prompts.jsonl"
    given = [
        {name: value for name, value in dataclasses.asdict(prompt).items() if value is not None}
        for prompt in prompts
    ]
    lines = [json.dumps(each) for each in given]
    prompts_file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = [
        f"--prompts_file={prompts_file}",
        f"--num_images_per_prompt={num_images_per_prompt}",
        *flags,
    ]
    for stage in STAGES:
        if stage.of_pictures and prompts[0].image is None:
            continue
        own_flags = settings if stage is ENCODE else []
        command = [sys.executable, str(PROJECT_DIR / "stages" / stage.script), *own_flags]
        result = subprocess.run([*command, f"--output_dir={output_dir}", "--skip_fresh"])
        if result.returncode != 0:
            # A stage ended by signal N has the return code -N, which shells report as 128 + N.
            raise SystemExit(
                result.returncode if result.returncode > 0 else 128 - result.returncode
            )
    count = len(prompts) * num_images_per_prompt
    names = [f"output_image_{index:04d}.png" for index in range(count)]
    return [
        np.asarray(Image.open(output_dir / name).convert("RGB"))
        for name in (names if count > 1 else ["output_image.png"])
    ]


# --- measurements -------------------------------------------------------------------------------


def score_pictures(scenes: Sequence[Scene], pictures: Sequence[np.ndarray]) -> Score:
    """Read every picture and compare it with the single-figure scene that it should show."""
    right = dict.fromkeys(ATTRIBUTES, 0)
    all_right = 0
    confusions: Counter[tuple[str, str, str | None]] = Counter()
    readings = []
    for scene, picture in zip(scenes, pictures, strict=True):
        reading = analyse_picture(picture)
        readings.append(reading)
        wrong = [
            (name, asked, getattr(reading, name))
            for name, asked in asked_attributes(scene).items()
            if getattr(reading, name) != asked
        ]
        confusions.update(wrong)
        all_right += not wrong
        for name in ATTRIBUTES.keys() - {name for name, _, _ in wrong}:
            right[name] += 1
    return Score(
        pictures=len(readings),
        right=right,
        all_right=all_right,
        confusions=confusions,
        readings=readings,
    )


def asked_attributes(scene: Scene) -> dict[str, str]:
    """The five words that a single-figure scene is made of, under the names in `ATTRIBUTES`."""
    figure = scene.figures[0]
    assert figure.size is not None and figure.position is not None
    return {
        "background": scene.background,
        "color": figure.color,
        "shape": figure.shape,
        "size": figure.size,
        "position": figure.position,
    }


def compare_sharpness(
    sharper: Sequence[np.ndarray], softer: Sequence[np.ndarray]
) -> tuple[int, int]:
    """Count the pairs that are sharper in the first list, and the pairs with figures in both."""
    pairs = [
        (first, second)
        for first, second in zip(map(sharpness, sharper), map(sharpness, softer), strict=True)
        if first is not None and second is not None
    ]
    return sum(first > second for first, second in pairs), len(pairs)


def mean_sharpness(pictures: Sequence[np.ndarray]) -> float | None:
    """Mean over the pictures with a figure; None where there is none."""
    values = [value for value in map(sharpness, pictures) if value is not None]
    return round(float(np.mean(values)), 4) if values else None


# --- what is written ----------------------------------------------------------------------------


def score_record(score: Score) -> dict[str, Any]:
    """A score for `evaluation.json`."""
    return {
        "pictures": score.pictures,
        "percentages": dict(zip([*ATTRIBUTES, "all_five"], score.percentages(), strict=True)),
        "confusions": [
            {"attribute": name, "asked": asked, "seen": seen, "pictures": count}
            for (name, asked, seen), count in score.confusions.most_common()
        ],
    }


def wrong_pictures(scenes: Sequence[Scene], score: Score) -> list[dict[str, Any]]:
    """Which pictures are wrong, and in what, for the eye to check."""
    records = []
    for index, (scene, reading) in enumerate(zip(scenes, score.readings, strict=True)):
        asked = asked_attributes(scene)
        seen = {name: getattr(reading, name) for name in ATTRIBUTES}
        wrong = {name: seen[name] for name in ATTRIBUTES if seen[name] != asked[name]}
        if wrong:
            records.append({"picture": index, "prompt": evaluation_prompt(scene), "seen": wrong})
    return records


def score_table(title: str, scores: dict[str, Score]) -> Table:
    """One row of percentages for each score, by the guidance that it was reached with."""
    return Table(
        title=f"{title}: right in % of the pictures",
        columns=["guidance", "pictures", *ATTRIBUTES.values(), "all five"],
        rows=[
            [name, str(score.pictures), *(f"{value:.1f}" for value in score.percentages())]
            for name, score in scores.items()
        ],
    )


def confusion_table(score: Score) -> Table:
    """The most frequent confusions of a score."""
    return Table(
        title="The most frequent confusions",
        columns=["", "asked for", "seen", "pictures"],
        rows=[
            [ATTRIBUTES[name], asked, seen or "nothing that fits", str(count)]
            for (name, asked, seen), count in score.confusions.most_common(CONFUSIONS_SHOWN)
        ],
    )


def make_grid(pictures: Sequence[np.ndarray]) -> Image.Image:
    """Lay the first pictures out in rows with white gaps."""
    shown = pictures[:GRID_PICTURES]
    height, width = shown[0].shape[:2]
    columns = min(GRID_COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    step_x, step_y = width + GRID_GAP, height + GRID_GAP
    grid = Image.new("RGB", (columns * step_x - GRID_GAP, rows * step_y - GRID_GAP), "white")
    for index, picture in enumerate(shown):
        row, column = divmod(index, columns)
        grid.paste(Image.fromarray(picture), (column * step_x, row * step_y))
    return grid


# --- the command --------------------------------------------------------------------------------


def measure_table(
    scenes: Sequence[Scene], seeds: int, output_dir: Path, flags: Sequence[str]
) -> tuple[dict[str, Any], list[Table], list[np.ndarray]]:
    """Make `seeds` pictures of every scene and count what is right in them."""
    pictures = make_pictures(
        make_prompts(scenes), output_dir=output_dir, num_images_per_prompt=seeds, flags=flags
    )
    shown_scenes = [scene for scene in scenes for _ in range(seeds)]
    score = score_pictures(shown_scenes, pictures)
    guidance = read_generation_config(output_dir).guidance_scale
    tables = [score_table("Held-out combinations", {f"{guidance:g}": score})]
    if score.confusions:
        tables.append(confusion_table(score))
    record = score_record(score) | {"wrong": wrong_pictures(shown_scenes, score)}
    return record, tables, pictures


def measure_sharpness(
    scenes: Sequence[Scene], output_dir: Path, flags: Sequence[str]
) -> tuple[dict[str, Any], Table]:
    """Compare pictures made plainly, asked to be blurry, and asked not to be; same seeds."""
    plain, blurry, refused = (
        make_pictures(
            make_prompts(scenes, first_words),
            output_dir=output_dir / f"sharpness_{name}",
            flags=[*flags, negative],
        )
        for name, first_words, negative in (
            ("plain", "", "--no_negative_prompt"),
            ("blurry_prompt", "blurry ", "--no_negative_prompt"),
            ("blurry_negative", "", "--negative_prompt=blurry"),
        )
    )
    means = [mean_sharpness(pictures) for pictures in (plain, blurry, refused)]
    softened, softened_of = compare_sharpness(plain, blurry)
    sharpened, sharpened_of = compare_sharpness(refused, plain)
    names = ("plain", "blurry_prompt", "blurry_negative")
    record = {
        "prompts": len(scenes),
        "mean_sharpness": dict(zip(names, means, strict=True)),
        "blurry_prompt_softer_than_plain": {"pairs": softened, "of": softened_of},
        "blurry_negative_sharper_than_plain": {"pairs": sharpened, "of": sharpened_of},
    }
    labels = ("no negative prompt", '"blurry" as first word', '"blurry" as negative prompt')
    directions = (
        "",
        f"softer than the first in {softened} of {softened_of}",
        f"sharper than the first in {sharpened} of {sharpened_of}",
    )
    table = Table(
        title=f"Mean sharpness of {len(scenes)} pictures (0.5: a step; 0.13: a blur of 3 pixels)",
        columns=["", "sharpness", "pairs with the same seed"],
        rows=[
            [label, "no figure" if mean is None else f"{mean:.3f}", direction]
            for label, mean, direction in zip(labels, means, directions, strict=True)
        ],
    )
    return record, table


def measure_guidance(
    scenes: Sequence[Scene], output_dir: Path, flags: Sequence[str]
) -> tuple[dict[str, Any], Table]:
    """Score the same prompts and seeds at several guidance scales."""
    scores = {}
    for scale in GUIDANCE_SCALES:
        pictures = make_pictures(
            make_prompts(scenes),
            output_dir=output_dir / f"guidance_{scale:g}",
            flags=[*flags, f"--guidance_scale={scale}"],
        )
        scores[f"{scale:g}"] = score_pictures(scenes, pictures)
    record = {name: score_record(score) for name, score in scores.items()}
    return record, score_table("Without and with guidance, same prompts and seeds", scores)


def main(
    prompts: Annotated[int, typer.Option("--prompts", help="How many prompts.", min=1)] = 200,
    seeds: Annotated[
        int, typer.Option("--seeds", help="Pictures of each prompt.", min=1, max=SEEDS_APART)
    ] = 3,
    num_inference_steps: Annotated[
        int, typer.Option("--num_inference_steps", help="Denoising steps.", min=1)
    ] = 20,
    guidance_scale: Annotated[
        float,
        typer.Option("--guidance_scale", help="Guidance; by default that of configs/demo.yaml."),
    ] = 5.0,
    model_id: Annotated[
        str | None, typer.Option("--model_id", help="Checkpoint; by default the pipeline's own.")
    ] = None,
    output_dir: Annotated[
        Path, typer.Option("--output_dir", help="Folder of the pictures and the results.")
    ] = Path("stage_outputs/evaluation"),
    sharpness_prompts: Annotated[
        int, typer.Option("--sharpness_prompts", help="Prompts to compare sharpness on.", min=1)
    ] = 40,
    guidance_prompts: Annotated[
        int, typer.Option("--guidance_prompts", help="Prompts to compare guidance on.", min=1)
    ] = 60,
    only_table: Annotated[
        bool, typer.Option("--only_table", help="Leave out sharpness and guidance.")
    ] = False,
) -> None:
    """Make pictures of held-out combinations with the pipeline and count what is right in them."""
    scenes = choose_scenes(prompts)
    common_flags = [f"--num_inference_steps={num_inference_steps}"]
    if model_id is not None:
        common_flags.append(f"--model_id={model_id}")
    flags = [*common_flags, f"--guidance_scale={guidance_scale}"]

    # 1. What is right in the pictures
    table_dir = output_dir / "table"
    record, tables, pictures = measure_table(scenes, seeds, table_dir, flags)
    make_grid(pictures).save(output_dir / "evaluation_grid.png")
    command = shlex.join(["python", "tools/demo/evaluate.py", *sys.argv[1:]])
    settings = read_generation_config(table_dir)
    results: dict[str, Any] = {
        "command": command,
        "settings": settings.model_dump(mode="json", exclude={"prompts"}),
        "table": record,
    }

    # 2. What the word "blurry" does, and what guidance does
    if not only_table:
        results["sharpness"], table = measure_sharpness(
            scenes[:sharpness_prompts], output_dir, flags
        )
        tables.append(table)
        results["guidance"], table = measure_guidance(
            scenes[:guidance_prompts], output_dir, common_flags
        )
        tables.append(table)

    # 3. Results
    markdown = f"    {command}\n\n" + "\n".join(table.to_markdown() for table in tables)
    (output_dir / "evaluation.json").write_text(
        json.dumps(results, indent=2) + "\n", encoding="utf-8"
    )
    (output_dir / "evaluation.md").write_text(markdown, encoding="utf-8")
    console = Console()
    for table in tables:
        console.print(table.to_rich())
    console.print(f"wrote evaluation.json, evaluation.md and evaluation_grid.png in {output_dir}")


if __name__ == "__main__":
    typer.run(main)
