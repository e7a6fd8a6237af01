"""Prompts as settings: as they are asked for, and resolved."""

import pytest
from pydantic import ValidationError

from common.conditions.prompt_settings import AskedPrompts, PromptSettings, ResolvedPrompts


def test_a_single_text_is_a_list_of_one() -> None:
    asked = AskedPrompts.model_validate({"prompt": "a ring", "prompt_2": "a star"})
    assert (asked.prompt, asked.prompt_2) == (("a ring",), ("a star",))
    assert AskedPrompts.model_validate({"prompt": ["a", "b"]}).prompt == ("a", "b")


def test_a_second_negative_prompt_needs_the_first() -> None:
    PromptSettings(prompt="a", negative_prompt="", negative_prompt_2="b")
    with pytest.raises(ValidationError, match="needs a negative_prompt"):
        PromptSettings(prompt="a", negative_prompt=None, negative_prompt_2="b")


def test_no_negative_prompt_is_not_an_empty_one() -> None:
    """And it has to be said which: diffusers means different things by them."""
    with pytest.raises(ValidationError, match="negative_prompt"):
        PromptSettings.model_validate({"prompt": "a"})
    none, empty = (PromptSettings(prompt="a", negative_prompt=text) for text in (None, ""))
    assert none != empty


def test_texts_are_recorded_for_each_kind() -> None:
    first = PromptSettings(prompt="a", prompt_2="b", negative_prompt="c", negative_prompt_2="d")
    second = PromptSettings(prompt="e", negative_prompt=None, seed=3)
    assert ResolvedPrompts(prompts=(first, second)).prompt_texts() == {
        "prompts": ["a", "e"],
        "prompts_2": ["b", None],
        "negative_prompts": ["c", None],
        "negative_prompts_2": ["d", None],
    }
    with pytest.raises(ValidationError, match="at least 1 item"):
        ResolvedPrompts(prompts=())
