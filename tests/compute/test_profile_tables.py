"""What a trace's operations add up to, by hand-made traces."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.compute.profile_tables import (
    MOST_OPERATIONS,
    TracedEvent,
    block_of,
    covered,
    kind_of,
    lines_of,
    make_profile,
    self_times,
)
from common.files.report import Profile

# Whole numbers, so that sums are exact.
SPANS = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), max_size=12).map(
    lambda pairs: [(float(start), float(start + length)) for start, length in pairs]
)


@given(SPANS)
def test_covered_time_is_that_of_each_instant(spans: list[tuple[float, float]]) -> None:
    instants = {second for start, end in spans for second in range(int(start), int(end))}
    assert covered(spans) == len(instants)


@given(st.recursive(st.just([]), lambda inner: st.lists(inner, max_size=3), max_leaves=12))
def test_self_times_are_without_what_lies_within(tree: list) -> None:
    """A call that calls others takes one second by itself, before them."""
    spans: list[tuple[float, float]] = []

    def call(calls: list, start: float) -> float:
        own = len(spans)
        spans.append((start, 0.0))
        end = start + 1
        for inner in calls:
            end = call(inner, end)
        spans[own] = (start, end)
        return end

    end = call(tree, 0.0)
    assert self_times(spans) == [1.0] * len(spans)
    assert self_times(spans[::-1]) == [1.0] * len(spans)
    assert covered(spans) == end


@pytest.mark.parametrize(
    ("module", "block", "kind"),
    [
        ("down_blocks.0.resnets.1.conv1", "down_blocks.0", "resnet"),
        ("down_blocks.0.resnets.1.norm1", "down_blocks.0", "norm"),
        ("mid_block.attentions.0.transformer_blocks.1.attn1.to_q", "mid_block", "attention"),
        ("up_blocks.2.attentions.0.transformer_blocks.0.ff.net.2", "up_blocks.2", "feed-forward"),
        ("up_blocks.0.upsamplers.0.conv", "up_blocks.0", "resampling"),
        ("decoder.mid_block.attentions.0.group_norm", "decoder.mid_block", "norm"),
        ("conv_in", "conv_in", "convolution"),
        ("time_embedding.linear_1", "time_embedding", "embedding"),
        ("quant_conv", "quant_conv", "convolution"),
        ("proj", "proj", "other"),
        ("", "outside of modules", "outside of modules"),
    ],
)
def test_modules_have_a_block_and_a_kind(module: str, block: str, kind: str) -> None:
    assert (block_of(module), kind_of(module)) == (block, kind)


def profile_of(events: list[TracedEvent], *, steps: range | None = None) -> Profile:
    return make_profile(
        events,
        devices=2,
        trace=Path("trace"),
        how_to_open="open it: here",
        steps=steps,
        window_seconds=10.0,
        idle_seconds=2.5,
    )


def test_operations_are_the_mean_over_devices() -> None:
    events = [
        TracedEvent("dot", "mid_block.attentions.0", 4.0),
        TracedEvent("dot", "mid_block.attentions.0", 2.0),
        TracedEvent("dot", "conv_in", 1.0),
        TracedEvent("copy", "", 7.0),
    ]
    profile = profile_of(events, steps=range(2, 5))
    found = [(o.name, o.module, o.seconds, o.count) for o in profile.operations]
    assert found == [
        ("copy", "", 3.5, 1),
        ("dot", "mid_block.attentions.0", 3.0, 2),
        ("dot", "conv_in", 0.5, 1),
    ]
    assert profile.steps == (2, 5)
    assert profile.by_block == {"outside of modules": 3.5, "mid_block": 3.0, "conv_in": 0.5}
    assert list(profile.by_kind) == ["outside of modules", "attention", "convolution"]


def test_a_table_is_printed_whose_rows_add_up() -> None:
    events = [TracedEvent(f"operation{i}", "conv_in", i / 100) for i in range(1, 61)]
    profile = profile_of(events)
    assert len(profile.operations) == MOST_OPERATIONS
    lines = list(lines_of(profile))
    busy = sum(range(1, 61)) / 100 / 2
    assert lines[0].endswith(f"10000.0 ms, of which operations {1e3 * busy:.1f} and none 2500.0")
    rows = [float(line.split()[0]) for line in lines if "%" in line]
    assert sum(rows) == pytest.approx(1e3 * busy, rel=1e-3)
    assert lines[-1].strip() == "open it: here"
