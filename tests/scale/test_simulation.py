"""Simulated hosts: as the formula where nothing is shared, else as what is shared lets them."""

from dataclasses import replace

import pytest

pytest.importorskip("common.scale.watch")

from common.scale.planning import ESTIMATES, Hosts, Plan, Shared, Shares, Work
from common.scale.simulation import simulate
from common.scale.watch import MOST_BETWEEN

PLAN = Plan(
    work=Work(images=10**6),
    hosts=Hosts(topology="v6e:2x4", chips=ESTIMATES["v6e:2x4"], cores=180, cores_of_text=60),
    shares=Shares(),
)
# Of a host, a second: it makes two files for a shard.
BYTES = PLAN.rate * PLAN.storage_bytes / PLAN.work.images
FILES = PLAN.rate / PLAN.work.shard_images * 2
ROOM = Shared(bytes_per_second=1e15, objects_per_second=1e9)


@pytest.mark.parametrize("hosts", [1, 40])
def test_hosts_alone_are_as_fast_as_the_formula(hosts: int) -> None:
    found = simulate(replace(PLAN, count=hosts), ROOM)
    assert found.of_linear == pytest.approx(1, abs=0.05)
    assert found.images_per_second == pytest.approx(hosts * PLAN.rate, rel=0.05)
    assert found.saturated is None


@pytest.mark.parametrize(
    ("shared", "name"),
    [
        (Shared(bytes_per_second=5 * BYTES, objects_per_second=1e9), "the target's bytes"),
        (Shared(bytes_per_second=1e15, objects_per_second=5 * FILES), "the target's files"),
    ],
)
def test_a_target_for_five_hosts_holds_up_forty(shared: Shared, name: str) -> None:
    found = simulate(replace(PLAN, count=40), shared)
    assert found.saturated == name and found.busy[name] > 0.9
    assert found.of_linear == pytest.approx(5 / 40, rel=0.1)
    assert simulate(replace(PLAN, count=4), shared).saturated is None


def test_text_encoders_that_are_slow_leave_hosts_idle() -> None:
    slow = replace(PLAN, shares=replace(PLAN.shares, text=60.0), count=4)
    assert slow.rate == slow.rate_of_text
    assert simulate(slow, ROOM).images_per_second == pytest.approx(4 * slow.rate, rel=0.3)


def test_what_waits_is_bounded() -> None:
    """By `watch.MOST_BETWEEN` and the encoders, whatever the makers need."""
    slow = replace(PLAN, shares=replace(PLAN.shares, shard=10_000.0), count=3)
    found = simulate(slow, ROOM)
    # What a host's maker has is in its own memory.
    shards = MOST_BETWEEN + slow.hosts.cores_of_text - 1
    bound = shards * slow.work.shard_images * slow.shares.embeddings_bytes
    assert found.object_store == pytest.approx(bound / ROOM.object_store_bytes, rel=0.02)
