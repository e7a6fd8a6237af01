"""The drawn world: deterministic, never a held-out triple in training, captions that fit."""

import random

import numpy as np

from tools.demo.drawn_shapes import (
    COLORS,
    PICTURE_SIZE,
    SHAPES,
    Figure,
    Scene,
    all_triples,
    draw_scene,
    evaluation_prompt,
    is_held_out,
    random_scene,
    vocabulary_words,
    write_caption,
)


def test_a_tenth_of_the_triples_is_held_out_and_never_drawn() -> None:
    held_out = {triple for triple in all_triples() if is_held_out(*triple)}
    assert len(all_triples()) == len(SHAPES) * len(COLORS) * (len(COLORS) - 1)
    assert 0.07 < len(held_out) / len(all_triples()) < 0.13
    rng = random.Random(1)
    seen = set()
    for _ in range(6000):
        scene = random_scene(rng)
        for figure in scene.figures:
            seen.add((figure.shape, figure.color, scene.background))
    assert not seen & held_out
    assert seen == set(all_triples()) - held_out


def test_a_scene_is_drawn_the_same_for_the_same_source_of_chance() -> None:
    pictures = []
    for _ in range(2):
        rng = random.Random(3)
        pictures.append([draw_scene(random_scene(rng), rng) for _ in range(20)])
    assert np.array_equal(pictures[0], pictures[1])
    assert pictures[0][0].shape == (PICTURE_SIZE, PICTURE_SIZE, 3)
    assert pictures[0][0].dtype == np.uint8


def test_captions_use_only_words_of_the_vocabulary() -> None:
    rng = random.Random(2)
    words = set(vocabulary_words())
    for _ in range(3000):
        caption = write_caption(random_scene(rng), rng)
        assert set(caption.replace(",", " ,").split()) <= words, caption


def test_the_evaluation_prompt_names_all_five() -> None:
    figure = Figure(shape="ring", color="orange", size="small", position="centre")
    scene = Scene(background="blue", figures=(figure,))
    assert evaluation_prompt(scene) == "a small orange ring in the centre on a blue background"
