"""What waits is named, and prompts are encoded no further ahead than a bound."""

import time
from typing import Any

import pytest

watch = pytest.importorskip("common.scale.watch")

from common.scale.makers import ENCODING, MAKING
from common.scale.ray_pools import Pool

POOLS = (Pool(ENCODING, 2, 1), Pool(MAKING, 2, 0, "TPU", 8))


def test_what_waits_is_named_after_a_while(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Remote:
        """An actor's method, and its answer."""

        def __init__(self, answer: Any) -> None:
            self.remote = lambda *_: answer

    class Pulse:
        all = Remote({"host-1": (ENCODING, "is at shard 000000000-ab", time.time() - 70)})

    monkeypatch.setattr(watch, "SECONDS_UNTIL_SAID", 0.0)
    monkeypatch.setattr(watch.ray, "remote", lambda **_: lambda _: Remote(Pulse))
    monkeypatch.setattr(watch.ray, "get", lambda answer, **_: answer)
    monkeypatch.setattr(watch.ray, "available_resources", lambda: {"CPU": 3.0})
    with watch.Watch(POOLS, "ab" * 28):
        time.sleep(1.5)
    said = capsys.readouterr().err
    assert "no shard for" in said and "is at shard 000000000-ab for 7" in said
    assert "0 of 2 process(es) of stages 0, 2 and 3, each with 8 TPU began: none" in said
    assert "free are 3 CPU, 0 TPU" in said


def test_rows_at_which_processes_end_are_counted() -> None:
    pulse = watch.Pulse(1, 1)
    assert [pulse.begins(MAKING, "a") for _ in range(3)] == [1, 2, 3]
    assert pulse.begins(ENCODING, "a") == pulse.begins(MAKING, "b") == 1
    assert [pulse.row_begins(MAKING, "a", row) for row in (7, 7, 8)] == [1, 2, 1]
    pulse.row_ends(MAKING, "a", 8)  # tried alone, and good
    assert [pulse.row_begins(MAKING, "a", row) for row in (8, 8, 7)] == [0, 0, 3]
    pulse.ends(MAKING, "a")
    assert pulse.begins(MAKING, "a") == pulse.row_begins(MAKING, "a", 7) == 1


def test_prompts_are_encoded_no_further_ahead_than_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    pulse = watch.Pulse(1, 1)
    assert [pulse.may_encode(shard) for shard in "abcdbe"] == [True] * 5 + [False]
    pulse.is_made("a")
    assert pulse.may_encode("e") and not pulse.may_encode("f") and pulse.between() == 4
    for host in ("host-1", "host-1", "host-2"):  # a second one has come
        pulse.tell(f"{host}-{len(host)}", MAKING, "opens its stages")
    assert [pulse.may_encode(shard) for shard in "fghi"] == [True] * 3 + [False]
    # Those that wait are on a node that is no more: as many again, once.
    monkeypatch.setattr(watch, "SECONDS_UNTIL_LOST", -1.0)
    assert pulse.may_encode("i") and pulse.between() == 1
    # The second host has said nothing for long.
    monkeypatch.setattr(watch, "SECONDS_UNTIL_LOST", 1000.0)
    pulse._said["host-2-6"] = (MAKING, "is at shard a", time.time() - 1001)
    assert [pulse.may_encode(shard) for shard in "jklm"] == [True, True, True, False]


def test_nothing_runs_ahead_of_hosts_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "SECONDS_UNTIL_LOST", -1.0)
    pulse = watch.Pulse(1, 1)
    assert [pulse.may_encode(shard) for shard in "abcde"] == [True] * 4 + [False]
