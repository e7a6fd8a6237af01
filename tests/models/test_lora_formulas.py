"""The formulas of LoRA's kin on single weights; tests/models/test_lora.py has them in files."""

import pytest
import torch

from common.models.lora_formulas import (
    METHODS,
    change,
    dora_axis,
    method_of,
    missing_pieces,
    rank_of,
)

WEIGHT = torch.arange(12.0).reshape(3, 4)


def test_a_method_is_told_by_its_pieces() -> None:
    titles = {
        ("down", "up"): "LoRA",
        ("down", "up", "mid", "alpha"): "LoRA",
        ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"): "LoHa",
        ("lokr_w1", "lokr_w2_a", "lokr_w2_b"): "LoKr",
        ("weight", "on_input"): "(IA)³",
        ("diff",): "full",
        ("diff_b",): "full",
    }
    for pieces, title in titles.items():
        found = method_of(frozenset(pieces))
        assert found is not None and found.title == title
    for method in METHODS:
        assert method_of(method.needs | method.may_have) is not None
    assert method_of(frozenset({"down", "alpha"})) is None
    assert missing_pieces(frozenset({"down", "alpha"})) == ["up"]
    assert missing_pieces(frozenset({"lokr_w1", "lokr_w2_b"})) == ["lokr_w2_a"]


def test_a_number_for_each_output_or_input_of_a_small_weight() -> None:
    ones = torch.ones(3)
    twice = change(WEIGHT, {"weight": ones, "on_input": torch.tensor(False)}, 1.0)
    assert torch.equal(twice, WEIGHT)
    with pytest.raises(RuntimeError, match="3 numbers for 4"):
        change(WEIGHT, {"weight": ones, "on_input": torch.tensor(True)}, 1.0)


def test_norms_are_of_the_axis_that_they_have() -> None:
    """With norms of 1 and nothing added, each output or input comes to length 1."""
    nothing = {"diff": torch.zeros(3, 4)}
    for scale, axis in ((torch.ones(3, 1), 1), (torch.ones(1, 4), 0), (torch.ones(3), 1)):
        made = WEIGHT + 1 + change(WEIGHT + 1, {**nothing, "dora_scale": scale}, 1.0)
        torch.testing.assert_close(made.norm(dim=axis), torch.ones(7 - made.shape[axis]))
    assert dora_axis((3, 4), (3, 1)) == dora_axis((3, 4), (3,)) == dora_axis((4, 4), (4,)) == 0
    assert dora_axis((3, 4), (1, 4)) == dora_axis((3, 4), (4,)) == 1
    with pytest.raises(RuntimeError, match="5 norms for 3"):
        change(WEIGHT, {**nothing, "dora_scale": torch.ones(5, 1)}, 1.0)


def test_a_rank_is_that_of_the_product() -> None:
    assert rank_of({"down": torch.zeros(2, 4, 3, 3), "up": torch.zeros(3, 2)}) == 2
    assert rank_of({"lokr_w1": torch.zeros(2, 2), "lokr_w2": torch.zeros(2, 2)}) is None


@pytest.mark.parametrize(
    ("up", "down"),
    [((3, 2), (2, 5)), ((3, 2), (3, 4)), ((2, 3), (3, 4)), ((3, 2, 3, 3), (2, 4)), ((3,), (2, 4))],
)
def test_shapes_that_do_not_fit_are_refused(up: tuple[int, ...], down: tuple[int, ...]) -> None:
    for device in ("cpu", "meta"):
        pieces = {
            name: torch.zeros(shape, device=device) for name, shape in (("up", up), ("down", down))
        }
        with pytest.raises((RuntimeError, IndexError)):
            change(WEIGHT.to(device), pieces, 1.0)
