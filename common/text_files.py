"""Read text, JSON and YAML out of files that may be damaged, or made to do harm."""

import codecs
import json
from pathlib import Path
from typing import Any

import yaml

MOST_BYTES = 64_000_000
MOST_YAML_BYTES = 1_000_000  # PyYAML takes some ten seconds for as much


def read_text(path: Path, most_bytes: int = MOST_BYTES) -> str:
    """A file's text: UTF-8, or UTF-16 where it begins with that one's mark; without the mark.

    Raises:
        OSError: it cannot be read.
        ValueError: it is neither, or too large to be what it should be.
    """
    with path.open("rb") as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ValueError(f"it is larger than {most_bytes // 1_000_000} MB")
    utf_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    encoding, name = ("utf-16", "UTF-16") if utf_16 else ("utf-8-sig", "UTF-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"line {line} is not {name} text: save it as UTF-8") from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise ValueError(f"line {line} holds NUL characters: save it as UTF-8 text")
    return text


def parse_json(text: str | bytes) -> Any:
    """The value that JSON holds. Raises `ValueError` where it is none, or has a key twice."""
    try:
        return json.loads(text, object_pairs_hook=_each_key_once)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_json_at(text: str, start: int) -> tuple[Any, int]:
    """The value that JSON holds from a place on, and where it ends. Raises as `parse_json`."""
    try:
        return json.JSONDecoder(object_pairs_hook=_each_key_once).raw_decode(text, start)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice")
    return found


def parse_yaml(text: str) -> Any:
    """The plain value that YAML holds: no objects, no aliases, which can grow without bound.

    Raises:
        ValueError: it is not YAML, or not plain.
    """
    try:
        return yaml.load(text, _PlainLoader)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except (LookupError, TypeError, AttributeError, OverflowError) as error:
        # PyYAML's constructors of numbers and dates, where a tag does not fit its value.
        raise ValueError(f"a value does not fit its tag ({error})") from None


class _PlainLoader(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            where = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "write the alias's value out", where)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            where = node.start_mark
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {twice!r} stands twice", where
            )
        return super().construct_mapping(node, deep)
