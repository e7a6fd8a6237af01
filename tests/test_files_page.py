"""docs/files.md is what the tests' own lists say."""

from tests.files_page import PAGE, page


def test_the_page_is_that_of_the_tests() -> None:
    assert PAGE.read_text(encoding="utf-8") == page()
