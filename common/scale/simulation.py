"""The pools of a plan on many hosts, shard by shard: what they would wait for.

A simulation of events: encoders take shards as far ahead as the pools let them
(`watch.MOST_BETWEEN`), makers take what is encoded, and what all hosts share serves one after the
other: the target's bytes, its files, the program that hands out shards.
"""

import random
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import simpy

from common.scale.planning import FURTHEST, Plan, Shared
from common.scale.watch import MOST_BETWEEN

FIRST, LAST = 3, 10  # of those that count: before it is begun to, after it hosts are idle
JITTER = 0.05  # of a maker's seconds, one standard deviation


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """What came of it."""

    hosts: int
    images_per_second: float
    of_linear: float  # beside as many times one host of the plan
    busy: dict[str, float]  # what all hosts share → the part of the time that it works
    object_store: float  # the part of it, of a host, that what waits took at most

    @property
    def saturated(self) -> str | None:
        """What is busier than it may be."""
        name = max(self.busy, key=lambda each: self.busy[each])
        if self.object_store > 1:
            return "Ray's object store"
        return name if self.busy[name] > FURTHEST else None


class _Server:
    """Something that serves one after the other."""

    def __init__(self, world: simpy.Environment, seconds: float) -> None:
        self.seconds, self.worked = seconds, 0.0
        self._world, self._place = world, simpy.Resource(world)

    def serve(self) -> Generator[Any, Any, None]:
        with self._place.request() as turn:
            yield turn
            yield self._world.timeout(self.seconds)
            self.worked += self.seconds


@dataclass
class _SoFar:
    """What shards have come to."""

    ended: int = 0
    waiting: int = 0  # encoded, and not begun to be made
    most_waiting: int = 0
    looks: list[tuple[float, dict[str, float]]] = field(default_factory=list)  # time, work done


def simulate(plan: Plan, shared: Shared, *, seed: int = 0) -> Simulated:
    """Let a plan's hosts make some shards each.

    Args:
        seed: of the jitter.
    """
    world, chosen = simpy.Environment(), random.Random(seed)
    work, hosts = plan.work, plan.count
    slower = plan.rate_of_text < plan.rate_of_chips
    a_round = hosts * (plan.hosts.cores_of_text if slower else 1)
    bytes_of_shard = plan.storage_bytes / work.images * work.shard_images
    servers = {
        "the program": _Server(world, plan.shares.program),
        "the target's bytes": _Server(world, bytes_of_shard / shared.bytes_per_second),
        "the target's files": _Server(world, plan.files_of_shard / shared.objects_per_second),
    }
    encoders = simpy.Resource(world, hosts * plan.hosts.cores_of_text)
    between = simpy.Resource(world, hosts * MOST_BETWEEN + encoders.capacity)
    makers = simpy.Resource(world, hosts)
    so_far, enough = _SoFar(), world.event()

    def shard() -> Generator[Any, Any, None]:
        place = between.request()
        yield place
        with encoders.request() as encoder:
            yield encoder
            yield world.timeout(work.shard_images * plan.shares.text)
        so_far.waiting += 1
        so_far.most_waiting = max(so_far.most_waiting, so_far.waiting)
        with makers.request() as maker:
            yield maker
            so_far.waiting -= 1
            seconds = plan.shard_seconds / (1 - plan.lost)
            yield world.timeout(seconds * max(0.1, chosen.gauss(1, JITTER)))
            yield from servers["the target's bytes"].serve()
            yield from servers["the target's files"].serve()
        yield from servers["the program"].serve()
        between.release(place)
        so_far.ended += 1
        if so_far.ended in (FIRST * a_round, LAST * a_round):
            worked = {name: own.worked for name, own in servers.items()}
            so_far.looks.append((world.now, worked))
        if so_far.ended == LAST * a_round:
            enough.succeed()

    for _ in range(between.capacity + (LAST + 1) * a_round):  # so that the place between is full
        world.process(shard())
    world.run(until=enough)
    (began, before), (ended_at, after) = so_far.looks
    seconds = ended_at - began
    rate = (LAST - FIRST) * a_round * work.shard_images / seconds
    store = so_far.most_waiting / hosts * work.shard_images * plan.shares.embeddings_bytes
    return Simulated(
        hosts=hosts,
        images_per_second=rate,
        of_linear=rate / (plan.rate * hosts),
        busy={name: (after[name] - before[name]) / seconds for name in servers},
        object_store=store / shared.object_store_bytes,
    )
