"""Read text, JSON and YAML out of files that may be damaged, or made to do harm."""

import json
from pathlib import Path
from typing import Any

import yaml

MOST_BYTES = 64_000_000
MOST_YAML_BYTES = 1_000_000  # PyYAML takes some ten seconds for as much


def read_text(path: Path, most_bytes: int = MOST_BYTES) -> str:
    """A file's text, without the mark that some editors put before it.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not UTF-8, or too large to be what it should be.
    """
    with path.open("rb") as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ValueError(f"it is larger than {most_bytes // 1_000_000} MB")
    return content.decode("utf-8-sig")


def parse_json(text: str | bytes) -> Any:
    """The value that JSON holds. Raises `ValueError` where it is none."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


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
