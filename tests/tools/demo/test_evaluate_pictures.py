"""The evaluation of runs that begin with pictures asks for what differs, and reads what is kept."""

import random

import numpy as np

from tools.demo.drawn_shapes import SHAPES
from tools.demo.evaluate import ATTRIBUTES
from tools.demo.evaluate_pictures import (
    another_shape,
    draw_pictures,
    in_another_color,
    kept_attributes,
)


def test_masks_hold_the_figure_and_little_else() -> None:
    for each in draw_pictures(30):
        apart = np.abs(each.pixels.astype(int) - each.pixels[0, 0]).max(-1) > 40
        assert each.mask[apart].all() and each.mask.mean() < 0.6
        rows, columns = (each.mask.any(axis) for axis in (1, 0))
        assert (each.mask == rows[:, None] & columns).all()


def test_what_is_asked_for_differs_in_one_thing() -> None:
    rng = random.Random(3)
    for each in draw_pictures(40):
        figure = each.scene.figures[0]
        prompt = another_shape(each.scene, rng)
        assert prompt.removeprefix("a ") in SHAPES and figure.shape not in prompt
        other = in_another_color(each.scene, rng).figures[0]
        assert other.color not in (figure.color, each.scene.background)
        assert (other.shape, other.size, other.position) == (
            figure.shape,
            figure.size,
            figure.position,
        )


def test_a_picture_keeps_itself_and_another_one_little() -> None:
    drawn = draw_pictures(30)
    pixels = [each.pixels for each in drawn]
    assert kept_attributes(drawn, pixels) == dict.fromkeys(ATTRIBUTES, 30)
    turned = kept_attributes(drawn, [*pixels[1:], pixels[0]])
    assert max(turned.values()) < 15
