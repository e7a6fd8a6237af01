"""The estimate of a TPU program by its schedule, on text small enough to follow by hand."""

from pathlib import Path

import pytest

from common.compute.chips import CHIPS
from common.compute.tpu_schedule import Scheduled, groups_of, schedule

V6E = CHIPS["v6e"]
GRID = [(x, y) for y in range(4) for x in range(2)]
LATENCY = 2e-6
LINK, MEMORY, CYCLE = 1 / 100e9, 1 / 1638e9, 1 / 1.75e9
SQUARES = "replica_groups={{0,1,2,3},{4,5,6,7}}"
# Arrays of a MB; f32[250000].
MB = "f32[250000]{0}"
SCALE = 1e6


def fusion(name: str, cycles: int, *operands: str, more: str = "", kind: str = MB) -> str:
    own = ", ".join(f"%{each}" for each in operands)
    return (
        f"  %{name} = {kind} fusion({own}), kind=kLoop, calls=%fused{more}, "
        f'metadata={{op_name="x/linear/y"}}, backend_config={{"estimated_cycles":"{cycles}"}}'
    )


def program(*lines: str, more: str = "") -> str:
    return (
        "HloModule m, is_scheduled=true\n\n"
        f"%fused (p: f32[8]) -> f32[8] {{\n  %p = f32[8]{{0}} parameter(0)\n}}\n\n{more}"
        f"ENTRY %main (a: f32[8]) -> f32[8] {{\n  %a = f32[8]{{0}} parameter(0)\n"
        + "\n".join(lines)
        + "\n}\n"
    )


def of(text: str) -> Scheduled:
    ((once, _),) = schedule(text, V6E, GRID, [LATENCY])
    return once


def test_a_collective_that_nothing_runs_beside_costs_all_of_it() -> None:
    found = of(
        program(
            f"  %g = {MB} all-gather(%a), channel_id=1, {SQUARES}, dimensions={{0}}",
            fusion("c", 1000, "g"),
        )
    )
    # Three quarters around a square, half of it each way.
    assert found.seconds["collectives"] == pytest.approx(SCALE * 3 / 8 * LINK + LATENCY)
    assert found.seconds["linear"] == pytest.approx(1000 * CYCLE) and found.hidden == 0
    assert found.total_seconds == pytest.approx(sum(found.seconds.values()))


def test_what_runs_beside_a_collective_hides_it() -> None:
    moving = SCALE * LINK + LATENCY  # to a neighbor
    for cycles in (1000, 1_000_000):
        found = of(
            program(
                f"  %s = ({MB}, {MB}, u32[], u32[]) collective-permute-start(%a), channel_id=1, "
                "source_target_pairs={{0,1},{1,0}}",
                fusion("c", cycles, "a"),
                f"  %d = {MB} collective-permute-done(%s)",
            )
        )
        left = max(0.0, moving - cycles * CYCLE)
        assert found.seconds["collectives"] == pytest.approx(left)
        assert found.hidden == pytest.approx(moving - left)


def test_a_collective_within_fusions_runs_from_the_first_to_the_last_one() -> None:
    gather = f"{MB} all-gather(%p), channel_id=7, {SQUARES}, dimensions={{0}}"
    carrying = "".join(
        f"%{name} (p: f32[8]) -> f32[8] {{\n  %g = {gather}\n}}\n\n"
        for name in ("starts", "goes_on", "ends")
    )
    lines = [
        fusion("s", 0, "a").replace("%fused", "%starts"),
        fusion("c", 2000, "s").replace("%fused", "%goes_on"),
        fusion("b", 500, "a"),
        fusion("d", 0, "c").replace("%fused", "%ends"),
    ]
    found = of(program(*lines, more=carrying))
    moving = SCALE * 3 / 8 * LINK + LATENCY
    assert found.seconds["collectives"] == pytest.approx(moving - 2500 * CYCLE)
    assert found.hidden == pytest.approx(2500 * CYCLE)


def test_collectives_follow_each_other_on_the_links() -> None:
    starts = [
        f"  %s{k} = ({MB}, {MB}, u32[], u32[]) collective-permute-start(%a), channel_id={k}, "
        "source_target_pairs={{0,1}}"
        for k in (1, 2)
    ]
    found = of(
        program(*starts, *(f"  %d{k} = {MB} collective-permute-done(%s{k})" for k in (1, 2)))
    )
    assert found.total_seconds == pytest.approx(2 * SCALE * LINK + LATENCY)


def test_what_is_fetched_ahead_is_waited_for_where_it_is_used() -> None:
    found = of(
        program(
            *(f"  %s{k} = ({MB}, {MB}, u32[]) copy-start(%a)" for k in (1, 2)),
            f"  %t = (({MB}), f32[50000]{{0}}, s32[]) slice-start(%a), slice={{[0:50000]}}",
            fusion("c", 100, "a"),
            f"  %d1 = {MB} copy-done(%s1)",
            f"  %d2 = {MB} copy-done(%s2)",
            "  %u = f32[50000]{0} slice-done(%t)",
        )
    )
    bytes_of_all = 2 * SCALE + 200_000
    assert found.seconds["fetching"] == pytest.approx(bytes_of_all * MEMORY - 100 * CYCLE)


def test_a_step_takes_no_less_than_its_weights() -> None:
    """Those that the loop's body uses, and does not change."""
    kinds = ", ".join([MB] * 3)
    body = (
        f"%body (arg: ({kinds})) -> ({kinds}) {{\n  %arg = ({kinds}) parameter(0)\n"
        + "".join(f"  %e{k} = {MB} get-tuple-element(%arg), index={k}\n" for k in range(3))
        + fusion("c", 100, "e0", "e1")
        + f"\n  ROOT %t = ({kinds}) tuple(%c, %e1, %e2)\n}}\n\n"
    )
    text = program(f"  %w = ({kinds}) while(%tuple), condition=%fused, body=%body", more=body)
    ((once, step),) = schedule(text, V6E, GRID, [LATENCY])
    assert step.seconds["memory"] == pytest.approx(SCALE * MEMORY - 100 * CYCLE)
    assert once.total_seconds == 0


def test_a_loop_of_known_length_is_as_often_as_it_is() -> None:
    """Of the program that the plain sum is tested with."""
    text = (Path(__file__).parent / "small_program.hlo").read_text()
    ((once, step),) = schedule(text, V6E, [(0, 0), (1, 0), (0, 1), (1, 1)], [LATENCY])
    assert once.seconds["convolution"] == pytest.approx(3 * 1000 * CYCLE)
    assert step.seconds["convolution"] == pytest.approx(1000 * CYCLE)
    scores = 20 * 4096 * 1024  # of a kernel, whose start counts as any operation's
    kernel = 4 * scores * 64 / (V6E.peak_flops / 4) + 2100 * CYCLE
    assert once.seconds["attention"] == pytest.approx(kernel)
    gathered = 16000 * 3 / 8 * LINK + LATENCY
    summed = 2 * 400 * 3 / 8 * LINK + LATENCY
    assert once.seconds["collectives"] == pytest.approx(gathered + summed)


@pytest.mark.parametrize(
    ("line", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, x={5}", [[0, 1], [2, 3]]),
        ("source_target_pairs={{1,0},{2,1}}", [[1, 0], [2, 1]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), y", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=1,'c'=2,'d'=1] {'c'}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=1,'c'=2] {'c','b'}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'c'=2] {'a'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'c'=2], device_ids=([2,2]T(1,0)) {'c'}", [[0, 2], [1, 3]]),
        ("replica_groups={}, to_apply=%sum", [[0, 1, 2, 3]]),
        ("to_apply=%sum", [[0, 1, 2, 3]]),
    ],
)
def test_groups_of_devices(line: str, groups: list[list[int]]) -> None:
    assert groups_of(f"%x = f32[] all-reduce(%y), {line}", 4) == groups


@pytest.mark.parametrize(
    "line", ["replica_groups=new['a']", "replica_groups=mesh['a'=4] {'a':(1)2}"]
)
def test_groups_in_another_form_are_no_guess(line: str) -> None:
    with pytest.raises(ValueError, match="not understood"):
        groups_of(f"%x = f32[] all-reduce(%y), {line}", 4)
