"""Images are computed in groups of one shape."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.compute.groups import group_size, groups


@given(st.integers(1, 50), st.integers(1, 20), st.integers(1, 8))
def test_groups_cover_every_image_once_and_in_order(images: int, batch: int, devices: int) -> None:
    size = group_size(min(images, batch), devices)
    assert size % devices == 0
    # No larger than asked for, beyond what the devices need to share evenly.
    assert size < min(images, batch) + devices
    covered: list[int] = []
    for chosen, real in groups(images, size):
        assert chosen.shape == (size,) and 0 < real <= size
        assert (chosen[real:] == images - 1).all()  # the last one fills up
        covered += chosen[:real].tolist()
    assert covered == list(range(images))


@pytest.mark.parametrize(
    ("images", "batch", "devices"), [(1, 8, 1), (7, 3, 1), (8, 8, 2), (3, 8, 4)]
)
def test_groups_cover_every_image_once(images: int, batch: int, devices: int) -> None:
    size = group_size(min(images, batch), devices)
    assert size % devices == 0
    seen: list[int] = []
    for chosen, real in groups(images, size):
        assert len(chosen) == size
        seen += chosen[:real].tolist()
    assert seen == list(range(images))
