"""What a process keeps from one run to the next: models on their devices, compiled programs."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

Loaded = TypeVar("Loaded")
MOST_MODELS = 2  # of a process; the one that was not used for the longest time goes


class Kept:
    """Models by what was loaded, and programs by what was compiled in, which weights are not."""

    def __init__(self, most_models: int = MOST_MODELS) -> None:
        self.most_models = most_models
        self._models: OrderedDict[Hashable, Any] = OrderedDict()
        self._programs: dict[Hashable, dict[Any, Any]] = {}

    def model(self, key: Hashable, load: Callable[[], Loaded]) -> Loaded:
        """A model that was loaded before under this key, or that is loaded now.

        Args:
            key: everything that determines what `load` gives.
        """
        if key in self._models:
            self._models.move_to_end(key)
        else:
            while len(self._models) >= self.most_models:
                self._models.popitem(last=False)  # before its successor needs the memory
            self._models[key] = load()
        found: Loaded = self._models[key]
        return found

    def programs(self, key: Hashable) -> dict[Any, Any]:
        """The compiled programs of one architecture on one mesh, by their shapes.

        Args:
            key: everything besides shapes that is compiled in.
        """
        return self._programs.setdefault(key, {})

    def clear(self) -> None:
        """Let go of everything."""
        self._models.clear()
        self._programs.clear()
