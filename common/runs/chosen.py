"""Some of a run's images, by their indices: `137,140-150`."""

import re

from common.errors import BadSettingError

_ITEM = re.compile(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?")


def parse_images(text: str, count: int, flag: str) -> list[int]:
    """The indices that a text names, in its order, each once.

    Args:
        count: of the run's images.
        flag: that the text was given to, for errors.

    Raises:
        BadSettingError: it is no list of indices, or the run has no such images.
    """
    found: dict[int, None] = {}
    for item in text.split(","):
        match = _ITEM.fullmatch(item)
        if match is None:
            raise BadSettingError(f"{flag} {text}: give indices and ranges, as 137,140-150")
        first = int(match[1])
        last = first if match[2] is None else int(match[2])
        if last < first:
            raise BadSettingError(f"{flag} {text}: {first} is after {last}: turn them round")
        if last >= count:
            raise BadSettingError(f"{flag} {text}: the run has images 0 to {count - 1}")
        found |= dict.fromkeys(range(first, last + 1))
    return [*found]
