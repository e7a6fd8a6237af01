"""Which mesh is chosen, and what is refused."""

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.compute.sharding import (
    SINGLE,
    axis_to_spread,
    choose_mesh,
    make_mesh,
    parse_mesh,
    rows_of_levels,
)
from common.errors import BadSettingError


def test_a_mesh_on_the_command_line() -> None:
    assert parse_mesh("auto") is None
    assert parse_mesh("single") == {"data": 1, "cfg": 1, "rows": 1, "tensor": 1}
    assert parse_mesh("cfg=2, rows=4") == SINGLE | {"cfg": 2, "rows": 4}
    for text in ("data", "data=0", "depth=2", "data=2,data=2", "data=-1", "", "cfg=3"):
        with pytest.raises(BadSettingError, match="--mesh"):
            parse_mesh(text)


@pytest.mark.parametrize(
    ("devices", "images", "guided", "rows", "expected"),
    [
        (8, 1, True, 128, "cfg=2,rows=4"),
        (8, 1, False, 128, "rows=8"),
        (8, 8, True, 128, "data=8"),
        (8, 2, True, 128, "data=2,cfg=2,rows=2"),
        (8, 4, True, 128, "data=4,cfg=2"),
        (8, 3, True, 128, "cfg=2,rows=4"),
        (4, 1, True, 128, "cfg=2,rows=2"),
        (1, 5, True, 128, "single"),
        (8, 1, True, 80, "cfg=2,rows=4"),  # 1536×640: 80, 40, 20 rows
        (3, 1, True, 96, "rows=3"),
    ],
)
def test_the_mesh_is_chosen_by_images_then_guidance_then_rows(
    devices: int, images: int, guided: bool, rows: int, expected: str
) -> None:
    choice = choose_mesh(
        None,
        devices=devices,
        images=images,
        guided=guided,
        rows_of_levels=rows_of_levels(rows, 3),
    )
    assert (str(choice), choice.notes) == (expected, ())


@given(
    st.integers(1, 64), st.integers(1, 64), st.booleans(), st.integers(1, 300), st.integers(1, 4)
)
def test_a_chosen_mesh_always_fits(
    devices: int, images: int, guided: bool, rows: int, levels: int
) -> None:
    heights = rows_of_levels(rows, levels)
    choice = choose_mesh(
        None, devices=devices, images=images, guided=guided, rows_of_levels=heights
    )
    sizes = choice.sizes
    used = sizes["data"] * sizes["cfg"] * sizes["rows"] * sizes["tensor"]
    assert used <= devices and (used == devices or choice.notes)
    assert images % sizes["data"] == 0
    assert all(height % sizes["rows"] == 0 for height in heights)
    assert sizes["cfg"] == 1 or guided


def test_a_mesh_that_is_asked_for_is_kept_or_the_next_possible_one_is_said() -> None:
    def choose(text: str, rows: int) -> tuple[str, str]:
        choice = choose_mesh(
            parse_mesh(text),
            devices=8,
            images=1,
            guided=True,
            rows_of_levels=rows_of_levels(rows, 3),
        )
        return str(choice), " ".join(choice.notes)

    assert choose("rows=8", 64) == ("rows=8", "")
    mesh, note = choose("cfg=2,rows=4", 24)  # 24, 12, 6
    assert mesh == "cfg=2,rows=2"
    assert "rows=4 does not divide the rows of every level of the model (24, 12, 6)" in note
    assert "4 device(s) stay idle" in note
    with pytest.raises(BadSettingError, match="needs 16 devices, but there are 8"):
        choose("cfg=2,rows=8", 64)


@pytest.mark.parametrize(
    ("devices", "images", "guided", "expected"),
    [
        (2, 1, True, "cfg=2"),
        (2, 1, False, "single"),
        (2, 4, True, "data=2"),
        (3, 2, True, "data=2"),
        (8, 3, True, "data=3,cfg=2"),
        (64, 8, True, "data=8,cfg=2"),
    ],
)
def test_cores_share_images_and_halves_but_no_rows(
    devices: int, images: int, guided: bool, expected: str
) -> None:
    choice = choose_mesh(
        None,
        devices=devices,
        images=images,
        guided=guided,
        rows_of_levels=[16, 8],
        split_rows=False,
    )
    assert (str(choice), choice.notes) == (expected, ())


def test_weights_are_spread_only_where_they_do_not_fit() -> None:
    mesh = make_mesh(SINGLE | {"cfg": 2, "rows": 4}, jax.devices())
    assert axis_to_spread(mesh, 5_000, None) is None
    assert axis_to_spread(mesh, 6_000, 10_000) is None
    assert axis_to_spread(mesh, 6_001, 10_000) == "rows"
    single = make_mesh(SINGLE, jax.devices())
    assert axis_to_spread(single, 6_001, 10_000) is None  # nowhere to spread to
    tensor = make_mesh(SINGLE | {"tensor": 2, "data": 4}, jax.devices())
    assert axis_to_spread(tensor, 12_000, 10_000) is None
    assert axis_to_spread(tensor, 12_002, 10_000) == "data"
