"""The pools that make shards: what has no room is refused, what waits is named."""

from typing import Any

import pytest

ray_pools = pytest.importorskip("common.scale.ray_pools")

from common.errors import BadSettingError, UnfitEnvironmentError
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


def test_what_each_asks_for_as_ray_takes_it() -> None:
    on_gpus = ray_pools.Pool(ray_pools.MAKING, 1, 0, "GPU", 2)
    assert ENCODING.options() == {"num_cpus": 1}
    assert ON_TPUS.options() == {"num_cpus": 0, "resources": {"TPU": 8}}
    assert on_gpus.options() == {"num_cpus": 0, "num_gpus": 2}


def test_pools_suit_the_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    def pools(nodes: list[dict[str, float]], *asked: Any) -> list[tuple[int, Any, int]]:
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
    # Of hosts that come later there are more.
    assert pools([tpu, {"CPU": 16.0}], 3, 9) == [(3, None, 0), (1, "TPU", 8)]
    to_come = (None, None, (1, None), "TPU:4")
    assert pools([{"CPU": 16.0}], *to_come) == [(2, None, 0), (1, "TPU", 4)]
    with refusal(UnfitEnvironmentError, "there is no room for 2 process(es) of stage 1"):
        pools([{"CPU": 1.0}], 2, *to_come[1:])


@pytest.mark.parametrize("asked", ["TPU", "TPU:0", "TPU:x", "CPU:1", ":8"])
def test_what_is_no_devices_of_a_host(asked: str) -> None:
    with refusal(BadSettingError, f"--host_chips {asked}: give what a host has"):
        ray_pools.chips_of_hosts(asked)


def test_hosts_that_compute_together_each_have_room() -> None:
    group = ray_pools.Pool(ray_pools.MAKING, 2, 1, hosts=2)
    alone = ray_pools.Pool(ray_pools.ENCODING, 1, 1)
    ray_pools.refuse_too_little([{"CPU": 2.0}] * 3, [alone, group])
    for nodes in ([{"CPU": 64.0}], [{"CPU": 2.0}] * 2):
        with refusal(UnfitEnvironmentError, "each on 2 hosts with 1 CPU"):
            ray_pools.refuse_too_little(nodes, [alone, group])


@pytest.mark.parametrize(
    ("asked", "found"),
    [(None, (1, None)), ("1", (1, None)), ("3", (3, None)), ("v6e:4x4", (4, "v6e:4x4"))],
)
def test_hosts_of_a_slice(asked: str | None, found: tuple[int, str | None]) -> None:
    assert ray_pools.hosts_of(asked) == found


@pytest.mark.parametrize("asked", ["0", "-1", "v6e", "v6e:axb", "v99:2x2", "two"])
def test_what_is_no_number_of_hosts(asked: str) -> None:
    with refusal(BadSettingError, f"--together {asked}"):
        ray_pools.hosts_of(asked)
