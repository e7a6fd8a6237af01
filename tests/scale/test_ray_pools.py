"""The pools that make shards: what has no room is refused, what waits is named."""

import time
from typing import Any

import pytest

ray_pools = pytest.importorskip("common.scale.ray_pools")

from common.errors import UnfitEnvironmentError
from tests.refusals import refusal

ENCODING = ray_pools.Pool(ray_pools.ENCODING, 2, 1)
ON_TPUS = ray_pools.Pool(ray_pools.MAKING, 2, 0, "TPU", 8)


def test_processes_that_would_wait_for_ever_are_refused() -> None:
    host = {"CPU": 2.0, "TPU": 8.0}
    ray_pools.refuse_too_little([host, host], [ENCODING, ON_TPUS])
    ray_pools.refuse_too_little([host, host, {"CPU": 64.0}], [ENCODING, ON_TPUS])
    for nodes in (
        [host],
        [host, {"CPU": 8.0}],
        [{"CPU": 1.0, "TPU": 8.0}, {"CPU": 0.5, "TPU": 8.0}],
    ):
        with refusal(
            UnfitEnvironmentError,
            "there is no room for 2 process(es) of stage 1, each with 1 CPU and 2 process(es) of "
            "stages 0, 2 and 3, each with 8 TPU",
            "give fewer (--encoders, --makers), or more nodes",
        ):
            ray_pools.refuse_too_little(nodes, [ENCODING, ON_TPUS])


def test_pools_suit_the_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    def pools(nodes: list[dict[str, float]], *asked: int | None) -> list[tuple[int, Any, int]]:
        told = [{"Alive": True, "Resources": node} for node in nodes]
        told.append({"Alive": False, "Resources": {"CPU": 99.0, "TPU": 8.0}})
        monkeypatch.setattr(ray_pools.ray, "nodes", lambda: told)
        found = ray_pools.pools_for(*(asked or (None, None)))
        return [(pool.processes, pool.resource, pool.chips) for pool in found]

    tpu = {"CPU": 112.0, "TPU": 8.0}
    assert pools([tpu, tpu, {"CPU": 16.0}]) == [(30, None, 0), (2, "TPU", 8)]
    assert pools([tpu, tpu], 3, 1) == [(3, None, 0), (1, "TPU", 8)]
    assert pools([{"CPU": 16.0, "GPU": 1.0}]) == [(2, None, 0), (1, "GPU", 1)]
    assert pools([{"CPU": 2.0}, {"CPU": 2.0}]) == [(1, None, 0), (2, None, 0)]


def test_what_waits_is_named_after_a_while(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Remote:
        """An actor's method, and its answer."""

        def __init__(self, answer: Any) -> None:
            self.remote = lambda *_: answer

    class Pulse:
        all = Remote({"host-1": (ray_pools.ENCODING, "is at shard 000000000-ab", time.time() - 70)})

    monkeypatch.setattr(ray_pools, "SECONDS_UNTIL_SAID", 0.0)
    monkeypatch.setattr(ray_pools.ray, "remote", lambda **_: lambda _: Remote(Pulse))
    monkeypatch.setattr(ray_pools.ray, "get", lambda answer, **_: answer)
    monkeypatch.setattr(ray_pools.ray, "available_resources", lambda: {"CPU": 3.0})
    with ray_pools.Watch([ENCODING, ON_TPUS]):
        time.sleep(1.5)
    said = capsys.readouterr().err
    assert "no shard for" in said and "is at shard 000000000-ab for 7" in said
    assert "0 of 2 process(es) of stages 0, 2 and 3, each with 8 TPU began: none" in said
    assert "Free are 3 CPU, 0 TPU" in said
