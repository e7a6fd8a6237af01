"""Classes of failures, their exit codes, and what of a library's words gets into a sentence."""

import pytest
from pydantic import BaseModel, ValidationError

from common import errors
from common.errors import (
    StageError,
    first_refusal,
    in_one_line,
    shorten,
    without_controls,
)


def test_each_class_has_the_documented_code() -> None:
    classes = [
        each
        for each in vars(errors).values()
        if isinstance(each, type) and issubclass(each, StageError)
    ]
    codes = {each.__name__: each.exit_code for each in classes}
    assert codes == {
        "StageError": 1,
        "BadSettingError": 2,
        "BadInputFileError": 3,
        "NotFiniteError": 4,
        "UnfitEnvironmentError": 5,
    }
    assert errors.__doc__ is not None
    assert all(f"{code} " in errors.__doc__ for code in codes.values())


def test_a_librarys_message_is_one_short_line() -> None:
    assert in_one_line(ValueError("first\n   second\tthird ")) == "first second third"
    assert len(in_one_line(ValueError("x" * 10_000))) == 300
    assert in_one_line(ValueError()) == ""


@pytest.mark.parametrize(
    ("text", "length", "expected"), [("abc", 3, "abc"), ("abcd", 3, "ab…"), ("", 0, "")]
)
def test_a_long_text_is_shortened(text: str, length: int, expected: str) -> None:
    assert shorten(text, length) == expected


def test_a_files_own_text_neither_breaks_the_line_nor_steers_the_terminal() -> None:
    assert without_controls("a\nb\x1b[2Jc → é\u202e") == r"a\nb\x1b[2Jc → é\u202e"


def test_what_a_model_refuses_first() -> None:
    class Inner(BaseModel):
        size: int

    class Outer(BaseModel):
        inner: Inner

    with pytest.raises(ValidationError) as caught:
        Outer.model_validate({"inner": {"size": "large"}})
    assert first_refusal(caught.value).startswith("inner.size: Input should be a valid integer")
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate(3)
    assert first_refusal(caught.value).startswith("Input should be a valid dictionary")
