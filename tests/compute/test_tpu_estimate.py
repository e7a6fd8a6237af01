"""The estimate of a TPU program, on HLO text small enough to add up by hand."""

from pathlib import Path

import pytest

from common.compute.chips import CHIPS
from common.compute.tpu_estimate import estimate, parse

V6E = CHIPS["v6e"]


HLO = (Path(__file__).parent / "small_program.hlo").read_text()


def test_an_estimate_adds_up() -> None:
    result, step = estimate(HLO, V6E)
    milliseconds = {part: 1e3 * seconds for part, seconds in result.seconds.items()}
    # The loop with a known count three times; what is inside a fusion not at all.
    assert milliseconds["convolution"] == pytest.approx(3 * 1000 / V6E.clock * 1e3)
    assert milliseconds["norm"] == pytest.approx(70 / V6E.clock * 1e3)
    assert milliseconds["copies"] == pytest.approx(30 / V6E.clock * 1e3)
    # Attention by its arithmetic: 4·20·4096·1024·64 products at a quarter of the peak, or the
    # exponentials of 20·4096·1024 scores, of which the former take longer.
    scores = 20 * 4096 * 1024
    kernel = max(4 * scores * 64 / (V6E.peak_flops / 4), scores / 2048 / V6E.clock)
    assert milliseconds["attention"] == pytest.approx(1e3 * kernel)
    assert result.kernel_cycles == pytest.approx(kernel * V6E.clock)
    assert result.cycles == pytest.approx(3100 + result.kernel_cycles)
    assert result.collectives == {"all-gather": 1, "all-reduce": 1}
    assert result.collective_bytes == {"all-gather": 16000, "all-reduce": 400}
    assert milliseconds["collectives"] == pytest.approx(1e3 * (16400 / 400e9 + 2 * 5e-6))
    assert result.total_seconds == pytest.approx(sum(result.seconds.values()))
    # The loop whose length is not known, apart.
    assert (step.cycles, step.operations) == (1000, 1)


def test_computations_are_told_apart() -> None:
    computations, entry = parse(HLO)
    assert entry == "main"
    assert set(computations) == {"fused", "body", "cond", "main"}
    assert [i.opcode for i in computations["body"]] == ["parameter", "fusion", "tuple"]


def test_collectives_within_fusions_count_once() -> None:
    """As the compiler for v5e writes them: one channel in the fusions that start and end it."""
    gather = (
        '%g = bf16[1,64]{1,0} all-gather(%p), channel_id=7, dimensions={1}, metadata={op_name="x"}'
    )
    called = "\n".join(
        f"%{name} (p: bf16[1,32]) -> bf16[1,64] {{\n  %p = bf16[1,32]{{1,0}} parameter(0)\n"
        f"  ROOT {gather}\n}}\n"
        for name in ("starts", "ends")
    )
    program = (
        f"HloModule m\n\n{called}\nENTRY %main (a: bf16[1,32]) -> bf16[1,64] {{\n"
        "  %a = bf16[1,32]{1,0} parameter(0)\n"
        "  %b = bf16[1,64]{1,0} fusion(%a), kind=kCustom, calls=%starts\n"
        "  ROOT %c = bf16[1,64]{1,0} fusion(%a), kind=kCustom, calls=%ends\n}\n"
    )
    once, _ = estimate(program, CHIPS["v5e"])
    assert once.collectives == {"all-gather": 1}
    assert once.collective_bytes == {"all-gather": 128}
    assert once.seconds["collectives"] == pytest.approx(128 / 200e9 + 5e-6)
