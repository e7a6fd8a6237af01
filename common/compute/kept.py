"""What a process keeps from one run to the next: models on their devices, compiled programs."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

Loaded = TypeVar("Loaded")
Shared = TypeVar("Shared")
MOST_MODELS = 2  # of a process; the one that was not used for the longest time goes


class Kept:
    """Models by what was loaded, and programs by what was compiled in, which weights are not."""

    def __init__(self, most_models: int = MOST_MODELS) -> None:
        self.most_models = most_models
        self._models: OrderedDict[tuple[Hashable, Hashable], Any] = OrderedDict()
        self._programs: dict[Hashable, dict[Any, Any]] = {}

    def model(self, key: Hashable, load: Callable[[], Loaded]) -> Loaded:
        """A model that was loaded before under this key, or that is loaded now.

        Args:
            key: everything that determines what `load` gives.
        """
        return self.variant(key, None, lambda _: None, lambda _: load())

    def variant(
        self,
        base: Hashable,
        added: Hashable,
        share: Callable[[Sequence[Loaded]], Shared],
        load: Callable[[Shared], Loaded],
    ) -> Loaded:
        """A model that has weights in common with others of its base, such as those of other LoRAs.

        Args:
            base, added: together everything that determines what `load` gives.
            share: what `load` gets of the models of the same base, the last used one the last.
        """
        key = base, added
        if key in self._models:
            self._models.move_to_end(key)
        else:
            shared = share([model for other, model in self._models.items() if other[0] == base])
            while len(self._models) >= self.most_models:
                self._models.popitem(last=False)  # before its successor needs the memory
            self._models[key] = load(shared)
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
