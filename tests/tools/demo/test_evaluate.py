"""The evaluation asks for held-out scenes evenly, and counts drawn pictures as what they are."""

import dataclasses
import json
import random
from collections import Counter

import numpy as np
import pytest

from tools.demo.drawn_shapes import Figure, Scene, all_triples, draw_scene, is_held_out
from tools.demo.evaluate import (
    ATTRIBUTES,
    FIRST_SEED,
    SEEDS_APART,
    choose_scenes,
    compare_sharpness,
    confusion_table,
    make_grid,
    make_prompts,
    mean_sharpness,
    score_pictures,
    score_record,
    score_table,
    wrong_pictures,
)


def draw_all(scenes: list[Scene]) -> list[np.ndarray]:
    rng = random.Random(1)
    return [draw_scene(scene, rng) for scene in scenes]


def triple(scene: Scene) -> tuple[str, str, str]:
    return scene.figures[0].shape, scene.figures[0].color, scene.background


# --- scenes and prompts -------------------------------------------------------------------------


def test_the_choice_of_scenes_is_deterministic() -> None:
    assert choose_scenes(70) == choose_scenes(70)
    assert choose_scenes(30) == choose_scenes(70)[:30]
    assert choose_scenes(30) != choose_scenes(30, seed=1)


def test_scenes_are_held_out_and_name_everything() -> None:
    for scene in choose_scenes(200):
        assert is_held_out(*triple(scene))
        assert len(scene.figures) == 1
        assert scene.spoiled is None
        assert scene.figures[0].size is not None
        assert scene.figures[0].position is not None


def test_scenes_come_evenly() -> None:
    scenes = choose_scenes(200)
    triples = Counter(map(triple, scenes))
    assert len(triples) == sum(is_held_out(*candidate) for candidate in all_triples())
    assert max(triples.values()) - min(triples.values()) <= 1
    places = Counter((scene.figures[0].size, scene.figures[0].position) for scene in scenes)
    assert len(places) == 15
    assert max(places.values()) - min(places.values()) <= 1


def test_prompts_have_seeds_that_no_other_prompt_reaches() -> None:
    scenes = choose_scenes(20)
    prompts = make_prompts(scenes)
    seeds = [prompt.seed + k for prompt in prompts for k in range(SEEDS_APART)]
    assert seeds[0] == FIRST_SEED
    assert len(set(seeds)) == len(seeds)
    blurry = make_prompts(scenes, "blurry ")
    assert [prompt.seed for prompt in blurry] == [prompt.seed for prompt in prompts]
    assert all(b.prompt == f"blurry {p.prompt}" for b, p in zip(blurry, prompts, strict=True))


# --- scores -------------------------------------------------------------------------------------


def test_correct_drawings_are_all_right() -> None:
    scenes = choose_scenes(80)
    score = score_pictures(scenes, draw_all(scenes))
    assert score.pictures == 80
    assert score.percentages() == [100.0] * 6
    assert not score.confusions
    assert wrong_pictures(scenes, score) == []


def change(scene: Scene, attribute: str, value: str) -> Scene:
    if attribute == "background":
        return dataclasses.replace(scene, background=value)
    figure: Figure = dataclasses.replace(scene.figures[0], **{attribute: value})
    return dataclasses.replace(scene, figures=(figure,))


@pytest.mark.parametrize(
    ("attribute", "asked", "drawn"),
    [
        ("background", "white", "black"),
        ("color", "orange", "red"),
        ("shape", "star", "cross"),
        ("size", "small", "medium"),
        ("position", "centre", "at the top"),
    ],
)
def test_a_wrong_drawing_is_wrong_in_what_was_changed(
    attribute: str, asked: str, drawn: str
) -> None:
    figure = Figure(shape="circle", color="green", size="large", position="on the left")
    scene = change(Scene(background="blue", figures=(figure,)), attribute, asked)
    pictures = draw_all([scene, change(scene, attribute, drawn)])
    score = score_pictures([scene, scene], pictures)
    assert score.right == {name: 1 if name == attribute else 2 for name in ATTRIBUTES}
    assert score.all_right == 1
    assert score.confusions == {(attribute, asked, drawn): 1}
    [wrong] = wrong_pictures([scene, scene], score)
    assert wrong["picture"] == 1
    assert wrong["seen"] == {attribute: drawn}


def test_an_empty_picture_has_only_its_background_right() -> None:
    figure = Figure(shape="ring", color="red", size="small", position="centre")
    scene = Scene(background="white", figures=(figure,))
    score = score_pictures([scene], [np.full((128, 128, 3), 246, np.uint8)])
    assert score.right == {"background": 1, "color": 0, "shape": 0, "size": 0, "position": 0}
    assert ("shape", "ring", None) in score.confusions


def test_a_picture_too_few_is_an_error() -> None:
    with pytest.raises(ValueError):
        score_pictures(choose_scenes(2), draw_all(choose_scenes(1)))


# --- sharpness ----------------------------------------------------------------------------------


def test_blurred_drawings_are_softer_in_every_pair() -> None:
    scenes = choose_scenes(20)
    sharp = draw_all(scenes)
    soft = draw_all([dataclasses.replace(scene, spoiled="blurred") for scene in scenes])
    assert compare_sharpness(sharp, soft) == (20, 20)
    assert compare_sharpness(soft, sharp) == (0, 20)
    assert compare_sharpness(sharp, sharp) == (0, 20)
    mean_sharp, mean_soft = mean_sharpness(sharp), mean_sharpness(soft)
    assert mean_sharp is not None and mean_soft is not None
    assert mean_soft < mean_sharp


def test_pictures_without_a_figure_are_left_out_of_sharpness() -> None:
    empty = np.full((128, 128, 3), 246, np.uint8)
    [drawn] = draw_all(choose_scenes(1))
    assert compare_sharpness([drawn, drawn], [empty, drawn]) == (0, 1)
    assert mean_sharpness([drawn, empty]) == mean_sharpness([drawn])
    assert mean_sharpness([empty]) is None


# --- what is written ----------------------------------------------------------------------------


def test_tables_and_record_say_the_score() -> None:
    figure = Figure(shape="square", color="purple", size="medium", position="centre")
    scene = Scene(background="yellow", figures=(figure,))
    pictures = draw_all([scene, change(scene, "color", "blue")])
    score = score_pictures([scene, scene], pictures)
    markdown = score_table("Title", {"7.5": score}).to_markdown()
    row = "| 7.5 | 2 | 100.0 | 50.0 | 100.0 | 100.0 | 100.0 | 50.0 |"
    assert markdown.startswith("**Title: right in % of the pictures**\n\n| guidance |")
    assert row in markdown.splitlines()
    confusions = confusion_table(score).to_markdown().splitlines()
    assert confusions[-1] == "| colour | purple | blue | 1 |"
    record = json.loads(json.dumps(score_record(score)))
    assert record["percentages"]["color"] == 50.0
    assert record["percentages"]["all_five"] == 50.0
    assert record["confusions"] == [
        {"attribute": "color", "asked": "purple", "seen": "blue", "pictures": 1}
    ]


@pytest.mark.parametrize(("count", "size"), [(1, (128, 128)), (40, (1038, 648)), (41, (1038, 648))])
def test_the_grid_shows_at_most_forty_pictures(count: int, size: tuple[int, int]) -> None:
    pictures = [np.zeros((128, 128, 3), np.uint8)] * count
    assert make_grid(pictures).size == size
