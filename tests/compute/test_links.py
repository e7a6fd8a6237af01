"""Collectives on a grid of chips, by bytes that are counted by hand."""

import pytest

from common.compute.links import fullest_link, links_between, ring_of

GRID = [(x, y) for y in range(4) for x in range(2)]  # two by four
LEFT, RIGHT = [0, 1, 2, 3], [4, 5, 6, 7]  # squares
SIZE = 1200


@pytest.mark.parametrize(
    ("kind", "groups", "size"),
    [
        # Neighbors: each sends its half.
        ("all-gather", [[0, 1]], 600),
        # Squares are rings: three parts of four, half of it each way.
        ("all-gather", [LEFT, RIGHT], 450),
        ("all-reduce", [LEFT, RIGHT], 900),
        ("reduce-scatter", [LEFT], 450),
        # Around all eight, which is a ring of the grid as well.
        ("all-gather", [[*range(8)]], SIZE * 7 / 8 / 2),
        # A line of four: what goes around comes back over the same links.
        ("all-gather", [[0, 2, 4, 6], [1, 3, 5, 7]], 900),
        # Pairs that are two links apart, of which the middle has those of two pairs.
        ("all-gather", [[0, 4], [2, 6]], 1200),
        ("collective-permute", [[0, 1], [1, 0]], 1200),
        ("collective-permute", [[0, 4], [2, 6]], 2400),
        ("all-to-all", [[0, 1]], 600),
        ("all-gather", [[0]], 0),
    ],
)
def test_the_fullest_link(kind: str, groups: list[list[int]], size: float) -> None:
    assert fullest_link(kind, groups, SIZE, GRID) == size


def test_a_ring_goes_the_shortest_way() -> None:
    ring = ring_of(((0, 0), (1, 1), (1, 0), (0, 1)))
    assert ring in (((0, 0), (0, 1), (1, 1), (1, 0)), ((0, 0), (1, 0), (1, 1), (0, 1)))
    assert list(links_between((0, 1), (1, 0))) == [((0, 1), (1, 1)), ((1, 1), (1, 0))]
