"""Which mesh is chosen, and what is refused."""

from dataclasses import dataclass

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.compute.sharding import (
    SINGLE,
    ActivationLayout,
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


@dataclass(frozen=True)
class OnGrid:
    """A device of a TPU's grid, as far as a mesh looks at it."""

    id: int
    coords: tuple[int, ...]


def test_rows_that_follow_each_other_are_neighbors(monkeypatch: pytest.MonkeyPatch) -> None:
    """On v6e:2x4, whose devices jax numbers along the shorter side."""
    made = []
    monkeypatch.setattr(jax.sharding, "Mesh", lambda grid, axes: made.append(grid))
    devices = [OnGrid(k, (k % 2, k // 2, 0)) for k in range(8)]
    make_mesh(SINGLE | {"cfg": 2, "rows": 4}, devices)
    make_mesh(SINGLE | {"rows": 8}, devices)
    make_mesh(SINGLE | {"data": 8}, devices)
    halves, whole, images = ([device.id for device in grid.flat] for grid in made)
    assert halves in ([0, 1, 3, 2, 4, 5, 7, 6], [0, 2, 3, 1, 4, 6, 7, 5])
    assert images == [*range(8)] and sorted(whole) == [*range(8)]
    for group in (halves[:4], halves[4:], whole):
        for first, second in zip(group, [*group[1:], group[0]], strict=True):
            (x, y, _), (u, v, _) = devices[first].coords, devices[second].coords
            assert abs(x - u) + abs(y - v) == 1
    # Two cores of a chip have one place: they stay as they are.
    make_mesh(SINGLE | {"rows": 4}, [OnGrid(k, (k // 2, 0, 0)) for k in (2, 0, 3, 1)])
    assert [device.id for device in made[-1].flat] == [2, 0, 3, 1]


@pytest.mark.parametrize(
    ("devices", "images", "predictions", "rows", "expected"),
    [
        (8, 1, 2, 128, "cfg=2,rows=4"),
        (8, 1, 1, 128, "rows=8"),
        (8, 8, 2, 128, "data=8"),
        (8, 2, 2, 128, "data=2,cfg=2,rows=2"),
        (8, 4, 2, 128, "data=4,cfg=2"),
        (8, 3, 2, 128, "cfg=2,rows=4"),
        (4, 1, 2, 128, "cfg=2,rows=2"),
        (1, 5, 2, 128, "single"),
        (8, 1, 2, 80, "cfg=2,rows=4"),  # 1536×640: 80, 40, 20 rows
        (3, 1, 2, 96, "rows=3"),
        (8, 1, 3, 128, "rows=8"),  # three predictions are no pairs
    ],
)
def test_the_mesh_is_chosen_by_images_then_predictions_then_rows(
    devices: int, images: int, predictions: int, rows: int, expected: str
) -> None:
    choice = choose_mesh(
        None,
        devices=devices,
        images=images,
        predictions=predictions,
        rows_of_levels=rows_of_levels(rows, 3),
    )
    assert (str(choice), choice.notes) == (expected, ())


@given(
    st.integers(1, 64),
    st.integers(1, 64),
    st.integers(1, 3),
    st.integers(1, 300),
    st.integers(1, 4),
)
def test_a_chosen_mesh_always_fits(
    devices: int, images: int, predictions: int, rows: int, levels: int
) -> None:
    heights = rows_of_levels(rows, levels)
    choice = choose_mesh(
        None, devices=devices, images=images, predictions=predictions, rows_of_levels=heights
    )
    sizes = choice.sizes
    used = sizes["data"] * sizes["cfg"] * sizes["rows"] * sizes["tensor"]
    assert used <= devices and (used == devices or choice.notes)
    assert images % sizes["data"] == 0
    assert all(height % sizes["rows"] == 0 for height in heights)
    assert predictions % sizes["cfg"] == 0


def test_a_mesh_that_is_asked_for_is_kept_or_the_next_possible_one_is_said() -> None:
    def choose(text: str, rows: int) -> tuple[str, str]:
        choice = choose_mesh(
            parse_mesh(text),
            devices=8,
            images=1,
            predictions=2,
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
    ("devices", "images", "predictions", "expected"),
    [
        (2, 1, 2, "cfg=2"),
        (2, 1, 1, "single"),
        (2, 1, 3, "single"),
        (2, 4, 2, "data=2"),
        (3, 2, 2, "data=2"),
        (8, 3, 2, "data=3,cfg=2"),
        (64, 8, 2, "data=8,cfg=2"),
    ],
)
def test_cores_share_images_and_predictions_but_no_rows(
    devices: int, images: int, predictions: int, expected: str
) -> None:
    choice = choose_mesh(
        None,
        devices=devices,
        images=images,
        predictions=predictions,
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


@pytest.mark.parametrize(
    ("predictions", "rows", "split_by", "do"),
    [
        (2, 16, (("data", "cfg"), ("rows",)), None),
        (1, 16, (("data",), ("rows", "cfg")), "take their share of the rows"),
        (1, 6, (("data",), ("rows",)), "compute the same as their twins"),  # 6 is not 2 times 2
        (3, 16, (("data",), ("rows", "cfg")), None),
    ],
)
def test_cfg_splits_predictions_or_else_rows(
    predictions: int, rows: int, split_by: tuple[tuple[str, ...], ...], do: str | None
) -> None:
    mesh = make_mesh(SINGLE | {"data": 2, "cfg": 2, "rows": 2}, jax.devices())
    layout = ActivationLayout.of(mesh, predictions=predictions, rows_of_levels=[rows])
    assert (layout.batch, layout.rows) == split_by
    assert layout.size_of(layout.batch) * layout.size_of(layout.rows) in (8, 4)
    if do is not None:
        assert layout.cfg_devices_do() == f"the devices of the other half {do}"
    # Every device holds its part, and the parts are the whole.
    put = jax.device_put(jax.numpy.arange(12 * rows).reshape(12, 1, rows, 1), layout.pictures())
    assert put.addressable_shards[0].data.shape == (
        12 // layout.size_of(layout.batch),
        1,
        rows // layout.size_of(layout.rows),
        1,
    )
