"""Text, JSON and YAML that may be damaged or made to do harm."""

import codecs
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import BadInputFileError
from common.text_files import parse_json, parse_json_at, parse_yaml, read_text
from tests.refusals import call, refusal


def test_text_is_read_without_an_editors_mark(tmp_path: Path) -> None:
    path = tmp_path / "text"
    for content in ("\ufeffä\n".encode(), "ä\n".encode("utf-16")):
        path.write_bytes(content)
        assert read_text(path) == "ä\n"
    path.write_bytes(codecs.BOM_UTF16_BE + "ä\n".encode("utf-16-be"))
    assert read_text(path) == "ä\n"


def test_too_much_and_what_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"x" * 2_000_001)
    with pytest.raises(ValueError, match="larger than 2 MB"):
        read_text(path, 2_000_000)
    with pytest.raises(ValueError, match="larger than 2 MB"):
        read_text(Path("/dev/zero"), 2_000_000)
    for content, words in (
        (b"a\nb\n\xff", "line 3 is not UTF-8 text: save it as UTF-8"),
        (codecs.BOM_UTF16_LE + b"a\0\n\0b", "line 2 is not UTF-16 text"),
        ("a\nb".encode("utf-16-le"), "line 1 holds NUL characters"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=words):
            read_text(path)


@pytest.mark.parametrize("parse", [parse_json, parse_yaml])
def test_a_key_that_stands_twice_is_refused(parse: object) -> None:
    with pytest.raises(ValueError, match="the key 'seed' stands twice"):
        parse('{"a": {"seed": 1, "b": 2, "seed": 3}}')  # type: ignore[operator]


def test_json_from_a_place_on() -> None:
    assert parse_json_at('[{"a": 1}, 2]', 1) == ({"a": 1}, 9)
    for text in ("", "[" * 100_000, '{"a": 1, "a": 2}'):
        with pytest.raises(ValueError):
            parse_json_at(text, 0)


@pytest.mark.parametrize("parse", [parse_json, parse_yaml])
@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000])
def test_deep_nesting_is_refused(parse: object, text: str) -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        parse(text)  # type: ignore[operator]


@pytest.mark.parametrize(
    "text",
    [
        "a: &x [1, 2]\nb: *x",  # grows without bound where aliases hold aliases
        "!!python/object/apply:os.system ['touch made']",
        "!!bool x",
        "!!timestamp x",
        "!!int x",
        "[",
        "a: " + "9" * 5000,
    ],
)
def test_yaml_holds_plain_values_only(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError):
        parse_yaml(text)
    assert not list(tmp_path.iterdir())


def test_plain_yaml_is_what_it_says() -> None:
    assert parse_yaml("a: [1, 2.5, yes]\nb: {c: null}") == {"a": [1, 2.5, True], "b": {"c": None}}


def make_nothing(path: Path) -> None:
    """No file."""


def make_folder(path: Path) -> None:
    path.mkdir()


def make_latin_1(path: Path) -> None:
    path.write_bytes("prompt: grün".encode("latin-1"))


def make_huge(path: Path) -> None:
    path.touch()
    os.truncate(path, 64_000_001)


@pytest.mark.parametrize("flag", ["config", "prompts_file"])
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (make_nothing, "does not exist"),
        (make_folder, "cannot be read: [Errno 21] Is a directory"),
        (make_latin_1, "cannot be read: line 1 is not UTF-8 text: save it as UTF-8"),
        (make_huge, "cannot be read: it is larger than"),
    ],
)
def test_a_text_file_that_cannot_be_read(
    tmp_path: Path, flag: str, make: Callable[[Path], None], words: str
) -> None:
    path = tmp_path / "file"
    make(path)
    with refusal(BadInputFileError, f"--{flag} {path} {words}"):
        call(1, "--output_dir", tmp_path / "run", f"--{flag}", path)
    assert not (tmp_path / "run").exists()
