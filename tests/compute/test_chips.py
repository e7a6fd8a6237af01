"""The figures of chips agree with each other."""

import pytest

from common.compute.chips import CHIPS, PEAK_BFLOAT16


@pytest.mark.parametrize(("name", "side"), [("v6e", 256), ("v5e", 128)])
def test_peaks_are_those_of_four_matrix_units(name: str, side: int) -> None:
    """Each multiplies and adds side × side numbers a cycle."""
    chip = CHIPS[name]
    assert chip.name == name
    assert chip.peak_flops == pytest.approx(4 * 2 * side**2 * chip.clock, rel=0.01)


def test_a_chip_has_one_peak() -> None:
    assert PEAK_BFLOAT16["TPU v6 lite"] == CHIPS["v6e"].peak_flops
    assert PEAK_BFLOAT16["TPU v5 lite"] == CHIPS["v5e"].peak_flops
    assert all(1e14 < peak < 1e15 for peak in PEAK_BFLOAT16.values())
