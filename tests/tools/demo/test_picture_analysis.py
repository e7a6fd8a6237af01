"""Pictures that were drawn are read back as what they were drawn from."""

import dataclasses
import random

import numpy as np
import pytest
from scipy import ndimage

from tools.demo.drawn_shapes import (
    COLORS,
    PICTURE_SIZE,
    POSITIONS,
    SHAPES,
    SIZES,
    Figure,
    Scene,
    all_triples,
    draw_scene,
)
from tools.demo.picture_analysis import analyse_picture, sharpness


def single_figure_scenes(count: int, seed: int) -> list[Scene]:
    rng = random.Random(seed)
    scenes = []
    for _ in range(count):
        shape, color, background = rng.choice(all_triples())
        size, position = rng.choice(list(SIZES)), rng.choice(list(POSITIONS))
        figure = Figure(shape=shape, color=color, size=size, position=position)
        scenes.append(Scene(background=background, figures=(figure,)))
    return scenes


def soften(pixels: np.ndarray, blur: float, seed: int) -> np.ndarray:
    """Blur and add faint noise, as a small VAE does."""
    noise = np.random.default_rng(seed).normal(0, 5, pixels.shape)
    blurred = ndimage.gaussian_filter(pixels.astype(np.float64), (blur, blur, 0))
    return np.clip(blurred + noise, 0, 255).astype(np.uint8)


def is_read_right(scene: Scene, pixels: np.ndarray) -> bool:
    reading, figure = analyse_picture(pixels), scene.figures[0]
    seen = (reading.background, reading.color, reading.shape, reading.size, reading.position)
    return seen == (scene.background, figure.color, figure.shape, figure.size, figure.position)


@pytest.mark.parametrize("blur", [None, 1.0, 1.5])
def test_drawn_pictures_are_read_right(blur: float | None) -> None:
    rng = random.Random(11)
    scenes = single_figure_scenes(300, seed=10)
    assert {scene.figures[0].shape for scene in scenes} == set(SHAPES)
    right = 0
    for index, scene in enumerate(scenes):
        pixels = draw_scene(scene, rng)
        right += is_read_right(scene, pixels if blur is None else soften(pixels, blur, index))
    assert right >= 0.99 * len(scenes)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_size_and_position_is_read_right(shape: str) -> None:
    rng = random.Random(12)
    for size in SIZES:
        for position in POSITIONS:
            figure = Figure(shape=shape, color="orange", size=size, position=position)
            scene = Scene(background="red", figures=(figure,))
            assert is_read_right(scene, draw_scene(scene, rng))


def test_a_shape_that_the_border_cuts_is_read_right() -> None:
    scenes = [s for s in single_figure_scenes(200, seed=13) if s.figures[0].size == "large"]
    rng = random.Random(14)
    for scene in scenes:
        x, y = POSITIONS[scene.figures[0].position or "centre"]
        pixels = np.roll(draw_scene(scene, rng), (8 * y, 8 * x), axis=(0, 1))
        # What was rolled past the border comes in on the other side: paint it over.
        if x:
            pixels[:, slice(0, 8) if x > 0 else slice(-8, None)] = COLORS[scene.background]
        if y:
            pixels[slice(0, 8) if y > 0 else slice(-8, None)] = COLORS[scene.background]
        assert is_read_right(scene, pixels)


@pytest.mark.parametrize("background", COLORS)
def test_an_empty_picture_has_a_background_and_no_shape(background: str) -> None:
    pixels = np.full((PICTURE_SIZE, PICTURE_SIZE, 3), COLORS[background], np.uint8)
    for picture in (pixels, soften(pixels, 1.0, seed=15)):
        reading = analyse_picture(picture)
        assert reading.background == background
        assert reading.color is None
        assert reading.shape is None
        assert reading.size is None
        assert reading.position is None
        assert reading.sharpness is None
        assert sharpness(picture) is None


@pytest.mark.parametrize("colors", [("blue", "blue"), ("black", "yellow")])
def test_two_figures_are_not_taken_for_one(colors: tuple[str, str]) -> None:
    figures = tuple(Figure(shape="circle", color=color) for color in colors)
    scene = Scene(background="white", figures=figures, arrangement="beside")
    assert analyse_picture(draw_scene(scene, random.Random(16))).shape is None


def test_speckles_change_nothing() -> None:
    rng = random.Random(17)
    for scene in single_figure_scenes(50, seed=18):
        pixels = draw_scene(scene, rng).copy()
        for _ in range(12):
            y, x = rng.randrange(PICTURE_SIZE - 3), rng.randrange(PICTURE_SIZE - 3)
            pixels[y : y + 3, x : x + 3] = rng.choice(list(COLORS.values()))
        assert is_read_right(scene, pixels)


def test_a_blurred_picture_is_less_sharp_than_the_same_scene_unspoiled() -> None:
    for index, scene in enumerate(single_figure_scenes(200, seed=19)):
        sharp = sharpness(draw_scene(scene, random.Random(index)))
        blurred_scene = dataclasses.replace(scene, spoiled="blurred")
        blurred = sharpness(draw_scene(blurred_scene, random.Random(index)))
        assert sharp is not None and blurred is not None
        assert blurred < sharp


@pytest.mark.parametrize("blur", [2.0, 3.0])
def test_sharpness_follows_its_formula_whatever_the_colours(blur: float) -> None:
    # Pixels average over a width of 1 and central differences over one of 2: they widen the edge by
    # the variances 1/12 and 1/3. 5 % for the curved edge and for outlines half a pixel off it.
    expected = 1 / np.sqrt(2 * np.pi * (blur**2 + 1 / 12 + 1 / 3))
    for color, background in (("white", "black"), ("orange", "yellow"), ("blue", "purple")):
        figure = Figure(shape="circle", color=color, size="large", position="centre")
        picture = draw_scene(Scene(background=background, figures=(figure,)), random.Random(20))
        blurred = ndimage.gaussian_filter(picture.astype(np.float64), (blur, blur, 0))
        measured = sharpness(blurred.round().astype(np.uint8))
        assert measured == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((64, 64, 3), np.uint8),
        np.zeros((PICTURE_SIZE, PICTURE_SIZE), np.uint8),
        np.zeros((PICTURE_SIZE, PICTURE_SIZE, 3), np.float32),
    ],
)
def test_anything_but_a_picture_is_refused(pixels: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8"):
        analyse_picture(pixels)
