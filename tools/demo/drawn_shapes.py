"""The small world that the demo checkpoint knows: coloured shapes on coloured backgrounds.

A `Scene` is drawn by `draw_scene` and put into words by `write_caption`; `random_scene` picks
scenes for training. Every tenth triple (shape, colour, background) is held out: no training
picture contains it, so pictures of held-out triples show that the model combines what it learned.
"""

import hashlib
import itertools
import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

PICTURE_SIZE = 128  # pixels

COLORS = {
    "red": (215, 35, 40),
    "green": (35, 160, 70),
    "blue": (40, 85, 215),
    "yellow": (250, 222, 50),
    "purple": (140, 55, 180),
    "orange": (245, 135, 25),
    "white": (246, 246, 246),
    "black": (22, 22, 22),
}
SHAPES = ("circle", "square", "triangle", "star", "diamond", "ring", "cross")
SIZES = {"small": 18, "medium": 28, "large": 40}  # radius in pixels
# Smaller shapes sit farther out, so that all of them stay inside the picture.
OFFSETS = {"small": 32, "medium": 28, "large": 22}  # pixels from the centre
POSITIONS = {
    "centre": (0, 0),
    "on the left": (-1, 0),
    "on the right": (1, 0),
    "at the top": (0, -1),
    "at the bottom": (0, 1),
}
PAIR_RADIUS, PAIR_OFFSET = 23, 31  # pixels
SPOILED_WORDS = {
    "blurred": ("blurry", "blurred", "out of focus", "low quality"),
    "noisy": ("noisy", "grainy", "low quality"),
    "distorted": ("distorted", "deformed", "warped"),
}
SUPERSAMPLING = 4


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One shape of a scene."""

    shape: str
    color: str
    size: str | None = None  # None in pairs, which have one size of their own
    position: str | None = None


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One picture: one figure, or two `beside` each other or the first `above` the second."""

    background: str
    figures: tuple[Figure, ...]
    arrangement: str | None = None  # None | "beside" | "above"
    spoiled: str | None = None  # None | "blurred" | "noisy" | "distorted"


def is_held_out(shape: str, color: str, background: str) -> bool:
    """Say whether a triple is kept out of training: a tenth of all, by a hash of its words."""
    digest = hashlib.sha256(f"{shape} {color} {background}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % 10 == 0


def all_triples() -> list[tuple[str, str, str]]:
    """Every (shape, colour, background) whose colour differs from its background."""
    return [
        (shape, color, background)
        for shape, color, background in itertools.product(SHAPES, COLORS, COLORS)
        if color != background
    ]


def random_scene(rng: random.Random) -> Scene:
    """Pick a scene for training: 15 % pairs, 15 % spoiled, never with a held-out triple."""
    while True:
        background = rng.choice(list(COLORS))
        others = [color for color in COLORS if color != background]
        if rng.random() < 0.15:
            arrangement = rng.choice(("beside", "above"))
            figures = tuple(
                Figure(shape=rng.choice(SHAPES), color=rng.choice(others)) for _ in range(2)
            )
        else:
            arrangement = None
            figures = (
                Figure(
                    shape=rng.choice(SHAPES),
                    color=rng.choice(others),
                    size=rng.choice(list(SIZES)),
                    position=rng.choice(list(POSITIONS)),
                ),
            )
        spoiled = rng.choice(list(SPOILED_WORDS)) if rng.random() < 0.15 else None
        if not any(is_held_out(f.shape, f.color, background) for f in figures):
            return Scene(
                background=background, figures=figures, arrangement=arrangement, spoiled=spoiled
            )


# --- pictures -----------------------------------------------------------------------------------


def draw_scene(scene: Scene, rng: random.Random) -> np.ndarray:
    """Draw a scene with a little jitter in place, size and colour. Returns [128, 128, 3] uint8."""
    side = PICTURE_SIZE * SUPERSAMPLING
    background = _jitter_color(COLORS[scene.background], rng)
    image = Image.new("RGB", (side, side), background)
    canvas = ImageDraw.Draw(image)
    for figure, (x, y, radius) in zip(scene.figures, _places(scene), strict=True):
        x, y = x + rng.uniform(-3, 3), y + rng.uniform(-3, 3)
        radius += rng.uniform(-1.5, 1.5)
        color = _jitter_color(COLORS[figure.color], rng)
        _draw_shape(canvas, figure.shape, x, y, radius, color, background)
    if scene.spoiled == "distorted":
        image = _distort(image, rng)
    image = image.resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.BOX)
    if scene.spoiled == "blurred":
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(3.0, 5.0)))
    pixels = np.asarray(image)
    if scene.spoiled == "noisy":
        generator = np.random.default_rng(rng.getrandbits(32))
        noise = generator.normal(0.0, rng.uniform(25.0, 45.0), pixels.shape)
        pixels = np.clip(pixels + noise, 0, 255).astype(np.uint8)
    return pixels


def _places(scene: Scene) -> list[tuple[float, float, float]]:
    """Centre and radius of each figure, in pixels."""
    middle = PICTURE_SIZE / 2
    if scene.arrangement == "beside":
        return [(middle + sign * PAIR_OFFSET, middle, PAIR_RADIUS) for sign in (-1, 1)]
    if scene.arrangement == "above":
        return [(middle, middle + sign * PAIR_OFFSET, PAIR_RADIUS) for sign in (-1, 1)]
    figure = scene.figures[0]
    assert figure.size is not None and figure.position is not None
    dx, dy = POSITIONS[figure.position]
    offset = OFFSETS[figure.size]
    return [(middle + dx * offset, middle + dy * offset, SIZES[figure.size])]


def _jitter_color(color: tuple[int, int, int], rng: random.Random) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, channel + rng.randint(-6, 6))) for channel in color)
    return red, green, blue


def _draw_shape(
    canvas: ImageDraw.ImageDraw,
    shape: str,
    x: float,
    y: float,
    radius: float,
    color: tuple[int, int, int],
    background: tuple[int, int, int],
) -> None:
    x, y, r = x * SUPERSAMPLING, y * SUPERSAMPLING, radius * SUPERSAMPLING
    if shape == "circle":
        canvas.ellipse((x - r, y - r, x + r, y + r), fill=color)
    elif shape == "square":
        half = 0.85 * r
        canvas.rectangle((x - half, y - half, x + half, y + half), fill=color)
    elif shape == "triangle":
        canvas.polygon(
            [(x, y - r), (x - 0.97 * r, y + 0.8 * r), (x + 0.97 * r, y + 0.8 * r)], color
        )
    elif shape == "star":
        points = []
        for corner in range(10):
            angle = -math.pi / 2 + corner * math.pi / 5
            reach = r if corner % 2 == 0 else 0.42 * r
            points.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
        canvas.polygon(points, fill=color)
    elif shape == "diamond":
        canvas.polygon([(x, y - r), (x - 0.75 * r, y), (x, y + r), (x + 0.75 * r, y)], fill=color)
    elif shape == "ring":
        canvas.ellipse((x - r, y - r, x + r, y + r), fill=color)
        hole = 0.55 * r
        canvas.ellipse((x - hole, y - hole, x + hole, y + hole), fill=background)
    elif shape == "cross":
        bar = 0.3 * r
        canvas.rectangle((x - r, y - bar, x + r, y + bar), fill=color)
        canvas.rectangle((x - bar, y - r, x + bar, y + r), fill=color)
    else:
        raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")


def _distort(image: Image.Image, rng: random.Random) -> Image.Image:
    """Bend an image by two sine waves, one along each axis."""
    pixels = np.asarray(image)
    rows, columns = np.mgrid[0 : image.height, 0 : image.width]

    def wave(along: np.ndarray) -> np.ndarray:
        amplitude = rng.uniform(4, 7) * SUPERSAMPLING
        length = rng.uniform(24, 40) * SUPERSAMPLING
        return amplitude * np.sin(2 * math.pi * (along / length + rng.random()))

    bent_rows = np.clip(rows + wave(columns), 0, image.height - 1).astype(np.int64)
    bent_columns = np.clip(columns + wave(rows), 0, image.width - 1).astype(np.int64)
    return Image.fromarray(pixels[bent_rows, bent_columns])


# --- words --------------------------------------------------------------------------------------


def write_caption(scene: Scene, rng: random.Random) -> str:
    """Put a scene into words, in one of several ways."""
    if scene.spoiled is not None and rng.random() < 0.35:
        return _complaints(scene.spoiled, rng)
    spoiled_word = rng.choice(SPOILED_WORDS[scene.spoiled]) if scene.spoiled else None
    inside = spoiled_word if spoiled_word and rng.random() < 0.4 else None
    caption = _describe(scene, inside, rng)
    if spoiled_word and inside is None:
        caption = rng.choice(
            (
                f"{spoiled_word} {caption}",
                f"{spoiled_word}, {caption}",
                f"{_article(spoiled_word)} {spoiled_word} picture of {caption}",
                f"{caption}, {spoiled_word}",
            )
        )
    return caption


def _complaints(spoiled: str, rng: random.Random) -> str:
    """A caption as negative prompts are written: what is wrong with the picture and no more."""
    words = list(SPOILED_WORDS[spoiled])
    rng.shuffle(words)
    words = words[: rng.randint(1, len(words))]
    if rng.random() < 0.5:
        return "blurry, low quality, distorted, deformed"
    return ", ".join(words)


def _describe(scene: Scene, adjective: str | None, rng: random.Random) -> str:
    background = scene.background
    on_background = rng.choice(
        (
            f" on {_article(background)} {background} background",
            f" on {_article(background)} {background} background",
            f", {background} background",
            f" on {background}",
        )
    )
    if scene.arrangement is None:
        figure = scene.figures[0]
        assert figure.size is not None and figure.position is not None
        size = None if figure.size == "medium" and rng.random() < 0.3 else figure.size
        subject = _noun_phrase([adjective, size, figure.color, figure.shape])
        if figure.position == "centre":
            place = rng.choice(("", "", "in the centre", "in the center", "in the middle"))
        else:
            place = figure.position
        if not place:
            caption = f"{subject}{on_background}"
        else:
            caption = rng.choice(
                (
                    f"{subject} {place}{on_background}",
                    f"{subject}{on_background}, {place}",
                    f"{place}, {subject}{on_background}",
                )
            )
    else:
        first, second = (_noun_phrase([adjective, f.color, f.shape]) for f in scene.figures)
        words = {
            "beside": (
                f"{first} to the left of {second}",
                f"{first} beside {second}",
                f"{first} next to {second}",
                f"{second} to the right of {first}",
                f"{first} and {second} side by side",
            ),
            "above": (
                f"{first} above {second}",
                f"{second} below {first}",
                f"{first} on top of {second}",
            ),
        }
        caption = f"{rng.choice(words[scene.arrangement])}{on_background}"
    if caption.startswith("a") and not caption.startswith("at ") and rng.random() < 0.15:
        caption = rng.choice(("a picture of ", "a drawing of ", "an image of ")) + caption
    return caption


def evaluation_prompt(scene: Scene) -> str:
    """The plain caption of a single figure, with its size and position always named."""
    figure = scene.figures[0]
    assert figure.size is not None and figure.position is not None
    place = "in the centre" if figure.position == "centre" else figure.position
    subject = _noun_phrase([figure.size, figure.color, figure.shape])
    return f"{subject} {place} on {_article(scene.background)} {scene.background} background"


def _noun_phrase(words: list[str | None]) -> str:
    phrase = " ".join(word for word in words if word)
    return f"{_article(phrase)} {phrase}"


def _article(phrase: str) -> str:
    return "an" if phrase[0] in "aeiou" else "a"


def vocabulary_words() -> list[str]:
    """Every word and punctuation mark that a caption can contain, sorted."""
    words = {
        *COLORS,
        *SHAPES,
        *SIZES,
        *(word for place in POSITIONS for word in place.split()),
        *(word for group in SPOILED_WORDS.values() for text in group for word in text.split()),
        *[
            "a",
            "an",
            "the",
            "on",
            "in",
            "of",
            "to",
            "and",
            "by",
            "next",
            "side",
            "left",
            "right",
            "top",
            "above",
            "below",
            "beside",
        ],
        *[
            "background",
            "picture",
            "drawing",
            "image",
            "centre",
            "center",
            "middle",
            "sharp",
            "clean",
            "shape",
        ],
        ",",
        ".",
    }
    return sorted(words)
