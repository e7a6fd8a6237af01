"""A prompt with alternatives is all of its combinations, or a sentence."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from common.conditions.dynamic_prompts import MOST_COMBINATIONS, combinations, with_combinations
from common.conditions.prompt_settings import AskedPrompts, PromptSettings
from common.errors import BadInputFileError, BadSettingError
from tests.refusals import refusal


@pytest.fixture
def wildcards(tmp_path: Path) -> Path:
    (tmp_path / "colors.txt").write_text("red\nblue\n")
    (tmp_path / "shapes").mkdir()
    (tmp_path / "shapes" / "round.txt").write_text("ring\n__nothing__\n")
    return tmp_path


def test_every_combination_is_made_once() -> None:
    parts = ("red", "blue", "green"), ("star", "ring"), ("", ", dark")
    template = "a {red|blue|green|red} {star|ring}{|, dark}, (big:1.2) [old] <lora:x:1>"
    found = combinations(template, None)
    expected = [
        f"a {a} {b}{c}, (big:1.2) [old] <lora:x:1>" for a, b, c in itertools.product(*parts)
    ]
    assert sorted(found) == sorted(expected) and len({*found}) == len(found) == 12
    assert combinations("a plain star", None) == ["a plain star"]
    assert combinations("", None) == [""]
    assert combinations("{2$$, $$a|b}", None) == ["a, b", "b, a"]


def test_wildcards_are_a_folders_files(wildcards: Path) -> None:
    assert sorted(combinations("a __colors__ star", wildcards)) == ["a blue star", "a red star"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a {red|blue", "'a {red|blue' cannot be read at '{red|blue'"),
        ("a {~red|blue} star", "chooses by chance or in turn at '{~red|blue} star'"),
        ("a {@red|blue} star", "all combinations are made; leave ~ and @ out"),
        ("a __~colors__", "chooses by chance or in turn"),
        ("{x|}" * 14, f"has more than {MOST_COMBINATIONS} combinations"),
        ("a __sizes__ {a|b}", "No values found for wildcard 'sizes'"),
        ("a __shapes/round__", "No values found for wildcard 'nothing'"),
        ("{a|b|c|d|e|f|g|h|i|j}" * 5, f"has more than {MOST_COMBINATIONS} combinations"),
    ],
)
def test_what_cannot_be_read_is_refused(wildcards: Path, text: str, said: str) -> None:
    with refusal(BadSettingError, "--prompt_syntax dynamic: the prompt", said):
        combinations(text, wildcards)


def test_a_comment_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert combinations("a star # 1", None) == ["a star "]
    assert "has a #: what follows it in the line is a comment" in capsys.readouterr().err


def of(**settings: Any) -> list[tuple[str, str | None, int | None]]:
    prompts = (
        PromptSettings(prompt="a {red|blue} star", negative_prompt="x", seed=3, id="s"),
        PromptSettings(prompt="a ring", negative_prompt=None, id="r"),
    )
    found = with_combinations(prompts, AskedPrompts(**settings))
    assert [prompt.negative_prompt for prompt in found] in (["x", None], ["x", "x", None])
    return [(prompt.prompt, prompt.id, prompt.seed) for prompt in found]


def test_what_else_a_prompt_has_stays(tmp_path: Path) -> None:
    assert of() == [("a {red|blue} star", "s", 3), ("a ring", "r", None)]
    assert of(prompt_syntax="dynamic") == [
        ("a red star", "s_0000", 3),
        ("a blue star", "s_0001", 3),
        ("a ring", "r", None),
    ]
    with refusal(BadSettingError, "--wildcards is for --prompt_syntax dynamic"):
        of(wildcards=tmp_path)
    with refusal(BadInputFileError, f"--wildcards {tmp_path / 'x'} is no folder"):
        of(prompt_syntax="dynamic", wildcards=tmp_path / "x")


def test_other_texts_are_taken_as_they_stand(capsys: pytest.CaptureFixture[str]) -> None:
    prompt = PromptSettings(prompt="a {red|blue} star", negative_prompt="{dull|grey}")
    found = with_combinations((prompt,), AskedPrompts(prompt_syntax="dynamic"))
    assert [each.negative_prompt for each in found] == ["{dull|grey}"] * 2
    assert "--prompt_syntax dynamic is for prompts alone" in capsys.readouterr().err
