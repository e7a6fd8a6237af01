"""Some of a run's images, as users name them."""

import pytest

from common.errors import BadSettingError
from common.runs.chosen import parse_images
from tests.refusals import refusal


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", [0]),
        ("7,2", [7, 2]),
        ("2-4", [2, 3, 4]),
        (" 1 , 3 - 4 ", [1, 3, 4]),
        ("3,2-4,3", [3, 2, 4]),  # each once
        ("9-9", [9]),
    ],
)
def test_indices_and_ranges(text: str, expected: list[int]) -> None:
    assert parse_images(text, 10, "--only") == expected


@pytest.mark.parametrize("text", ["", ",", "a", "1,", "1-", "-1", "1-2-3", "1.5", "1;2"])
def test_what_is_no_index(text: str) -> None:
    with refusal(BadSettingError, f"--only {text}", "give indices and ranges, as 137,140-150"):
        parse_images(text, 10, "--only")


def test_images_that_there_are_not() -> None:
    with refusal(BadSettingError, "--only 3,10", "the run has images 0 to 9"):
        parse_images("3,10", 10, "--only")
    with refusal(BadSettingError, "--only 4-2: 4 is after 2"):
        parse_images("4-2", 10, "--only")
