"""What a collective takes on the links of a grid of chips: bytes, hop by hop.

Each chip has a link to each neighbor, without wrap-around, which carries as much each way at the
same time. What is gathered or summed goes around a ring of the group's devices, half of it each way
(bidirectional ring algorithms: Thakur, Rabenseifner and Gropp 2005, for one way); a hop between
chips that are no neighbors goes over the links between them, first along the first side. All groups
of an operation move at once, and what the fullest link carries counts.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise, permutations

Position = tuple[int, ...]
MOST_TRIED = 8  # devices of a group whose orders are all tried; larger ones stay as they are

# How often all that a group has in the end goes through each hop of its ring, but for one's part.
ROUNDS = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2}


def fullest_link(
    kind: str, groups: Sequence[Sequence[int]], size: int, grid: Sequence[Position]
) -> float:
    """The bytes that the fullest link carries, one way.

    Args:
        kind: of collective, as XLA names it.
        groups: of devices, by their numbers; of a `collective-permute` pairs, from and to.
        size: bytes of what a device has in the end: of an `all-gather` all parts; of a
            `reduce-scatter` what it had before.
        grid: where each device is.
    """
    loads: Counter[tuple[Position, Position]] = Counter()
    for group in groups:
        count, places = len(group), [grid[device] for device in group]
        if kind == "collective-permute":
            hops, part = [(places[0], places[1])], float(size)
        elif kind in ROUNDS:
            ring = ring_of(tuple(places))
            around = list(pairwise([*ring, ring[0]]))
            hops = [*around, *((to, of) for of, to in around)]
            part = ROUNDS[kind] * size * (count - 1) / count / 2
        else:  # all-to-all: a part for each
            hops, part = list(permutations(places, 2)), size / count
        for of, to in hops:
            for link in links_between(of, to):
                loads[link] += part  # type: ignore[assignment]
    return max(loads.values(), default=0.0)


def links_between(of: Position, to: Position) -> Iterator[tuple[Position, Position]]:
    """The links of a way between two chips, side after side."""
    here = list(of)
    for side, goal in enumerate(to):
        while here[side] != goal:
            before = tuple(here)
            here[side] += 1 if goal > here[side] else -1
            yield before, tuple(here)


@lru_cache(maxsize=1000)
def ring_of(places: tuple[Position, ...]) -> tuple[Position, ...]:
    """The order of places around which the way is shortest."""
    if len(places) > MOST_TRIED:
        return places
    first, *others = places
    return min(((first, *each) for each in permutations(others)), key=_length)


def _length(ring: tuple[Position, ...]) -> int:
    return sum(
        abs(a - b) for of, to in pairwise([*ring, ring[0]]) for a, b in zip(of, to, strict=True)
    )
