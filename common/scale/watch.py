"""What the processes of a list are at: who waits for what, and how much is between the pools."""

import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass
from typing import Any, Self

import ray

from common.errors import in_one_line
from common.messages import warn
from common.scale.makers import MAKING
from common.scale.ray_pools import Pool, free_of, on_node

SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_UNTIL_SAID = 60.0  # without a shard
SECONDS_UNTIL_LOST = 600.0  # without a shard, after which those that wait may be no more
MOST_BETWEEN = 3  # shards whose prompts are encoded and that are not made, for each maker


class Pulse:
    """What each process says that it is at, and which shards are between the pools."""

    def __init__(self, encoders: int, makers: int) -> None:
        """
        Args:
            makers: at the begin; there are more as hosts come.
        """
        self._said: dict[str, tuple[str, str, float]] = {}
        self._encoders, self._makers = encoders, makers
        self._between, self._made_at = set[str](), time.monotonic()
        self._begun = Counter[tuple[str, str]]()  # by pool and shard, of those at work
        self._alone: dict[tuple[str, str], Counter[int]] = {}  # their rows that were tried alone

    def may_encode(self, shard: str) -> bool:
        """Whether a shard's prompts may be encoded now: not where many wait to be made.

        But where none is made for a while, those that wait may be on a node that is no more.
        """
        most = MOST_BETWEEN * max(self._makers, self._at_work(MAKING)) + self._encoders
        if len(self._between - {shard}) >= most:
            one_began = any(pool == MAKING for pool, _, _ in self._said.values())
            if time.monotonic() - self._made_at < SECONDS_UNTIL_LOST or not one_began:
                return False
            self._between.clear()
            self._made_at = time.monotonic()
        self._between.add(shard)
        return True

    def begins(self, pool: str, shard: str) -> int:
        """Note that a pool's process begins a shard. Returns how often one has."""
        self._begun[pool, shard] += 1
        return self._begun[pool, shard]

    def ends(self, pool: str, shard: str) -> None:
        """Note that it has done it."""
        self._begun.pop((pool, shard), None)
        self._alone.pop((pool, shard), None)

    def row_begins(self, pool: str, shard: str, row: int) -> int:
        """`sifting.Ends.begins`."""
        tried = self._alone.setdefault((pool, shard), Counter())
        if tried[row] >= 0:
            tried[row] += 1
        return max(0, tried[row])

    def row_ends(self, pool: str, shard: str, row: int) -> None:
        """`sifting.Ends.ends`."""
        self._alone[pool, shard][row] = -1

    def _at_work(self, pool: str) -> int:
        """How many hosts have processes of a pool that have said something lately."""
        since = time.time() - SECONDS_UNTIL_LOST
        return len(
            {
                name.rpartition("-")[0]
                for name, (of, _, at) in self._said.items()
                if of == pool and at > since
            }
        )

    def is_made(self, shard: str) -> None:
        self._between.discard(shard)
        self._made_at = time.monotonic()

    def between(self) -> int:
        return len(self._between)

    def tell(self, process: str, pool: str, doing: str) -> None:
        self._said[process] = pool, doing, time.time()

    def all(self) -> dict[str, tuple[str, str, float]]:
        return self._said


@dataclass(frozen=True)
class EndsByPulse:
    """What the pulse knows of a shard's rows (`sifting.Ends`)."""

    pulse: Any  # the actor
    pool: str
    shard: str

    def begins(self, row: int) -> int:
        times: int = ray.get(self.pulse.row_begins.remote(self.pool, self.shard, row))
        return times

    def ends(self, row: int) -> None:
        ray.get(self.pulse.row_ends.remote(self.pool, self.shard, row))


class Looking(ABC):
    """Within its block a thread looks, again and again."""

    def __init__(self, seconds: float) -> None:
        """
        Args:
            seconds: between two looks.
        """
        self._seconds, self._ended = seconds, threading.Event()
        self._thread = threading.Thread(target=self._go_on, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _go_on(self) -> None:
        while not self._ended.wait(self._seconds):
            self.look()

    @abstractmethod
    def look(self) -> None:
        """Look once."""


class Watch(Looking):
    """Says what waits for what, where no shard comes for a while."""

    def __init__(self, pools: tuple[Pool, Pool], node: str) -> None:
        """
        Args:
            node: this program's, by its id.
        """
        super().__init__(SECONDS_BETWEEN_LOOKS)
        encoding, making = pools
        # On another node all processes would lose it with that.
        here = on_node(node)
        self.pulse = ray.remote(num_cpus=0, scheduling_strategy=here)(Pulse).remote(
            encoding.processes, making.processes
        )
        self._pools, self._at = pools, time.monotonic()

    def shard_came(self) -> None:
        """Count from now on."""
        self._at = time.monotonic()

    def look(self) -> None:
        """Say what waits, where it is time to."""
        if time.monotonic() - self._at >= SECONDS_UNTIL_SAID:
            warn(f"no shard for {time.monotonic() - self._at:.0f} s: {self._what_waits()}")
            self._at = time.monotonic()

    def _what_waits(self) -> str:
        try:
            told = ray.get(self.pulse.all.remote(), timeout=10)
            free = free_of(self._pools)
        except Exception as error:  # of a cluster in trouble, which is what is to be said
            return f"the cluster does not answer ({in_one_line(error)})"
        parts = []
        for pool in self._pools:
            own = [(doing, since) for kind, doing, since in told.values() if kind == pool.name]
            at_work = [f"{doing} for {time.time() - since:.0f} s" for doing, since in own]
            parts.append(f"{len(own)} of {pool.said()} began: {'; '.join(at_work) or 'none'}")
        return "; ".join([". ".join(parts), free])
