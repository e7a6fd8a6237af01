"""The pools of processes that make shards, as Ray runs them: on this machine, or on a cluster."""

import logging
import os
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import ray
from ray.data import ActorPoolStrategy, DataContext

from common.compute.platforms import usable_cores
from common.errors import StageError, UnfitEnvironmentError, error_of, in_one_line
from common.messages import warn
from common.scale.makers import ENCODING, MAKING, Encoder, Made, Maker, Making
from common.scale.shards import Shard

SECONDS_UNTIL_SAID = 60.0  # without a shard
MOST_AT_ONCE = 2  # shards that wait at a process, or are in it


@dataclass(frozen=True)
class Pool:
    """Processes of one kind."""

    name: str
    processes: int
    cpus: float  # of each
    resource: str | None = None  # such as TPU
    chips: int = 0  # of it

    def needs(self) -> dict[str, float]:
        """What each asks the cluster for."""
        asked = {"CPU": self.cpus, self.resource: self.chips}
        return {name: float(value) for name, value in asked.items() if name is not None and value}

    def said(self) -> str:
        parts = ", ".join(f"{value:g} {name}" for name, value in self.needs().items())
        return f"{self.processes} process(es) of {self.name}, each with {parts}"


def join(address: str | None, *, debug: bool = False) -> None:
    """Start Ray on this machine, or join the cluster of an address.

    Args:
        debug: let Ray say all that it has to.

    Raises:
        UnfitEnvironmentError: there is none.
    """
    if not debug:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        logging.getLogger("ray").setLevel(logging.ERROR)
        logging.getLogger("ray.data").setLevel(logging.ERROR)
    more: dict[str, Any] = {} if address else {"num_cpus": max(2, usable_cores())}
    try:
        ray.init(
            address=address or "local",  # whatever RAY_ADDRESS says
            include_dashboard=False if address is None else None,
            log_to_driver=False,
            logging_level="error",
            configure_logging=False,
            **more,
        )
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise UnfitEnvironmentError(
            f"--address {address}: no Ray cluster can be joined ({in_one_line(error)}): start one, "
            "or leave --address out"
        ) from None


def pools_for(encoders: int | None, makers: int | None) -> tuple[Pool, Pool]:
    """Those of stage 1 and of the stages on devices, that suit the cluster's nodes.

    Args:
        encoders, makers: how many processes are asked for.

    Raises:
        UnfitEnvironmentError: no node has room for one, or not all of them fit.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    resource = next((name for name in ("TPU", "GPU") if any(name in node for node in nodes)), None)
    if resource is not None:
        hosts = [node for node in nodes if node.get(resource)]
        chips = int(min(node[resource] for node in hosts))
        # Without a claim to CPUs, which those of stage 1 may all have taken on its host.
        making = Pool(MAKING, makers or len(hosts), 0, resource, chips)
        free = sum(node.get("CPU", 0) for node in nodes)
        encoding = Pool(ENCODING, encoders or max(1, int(free) // 8), 1)
    else:
        making = Pool(MAKING, makers or len(nodes), 1)
        encoding = Pool(ENCODING, encoders or 1, 1)
    refuse_too_little(nodes, [encoding, making])
    return encoding, making


def refuse_too_little(nodes: Sequence[Mapping[str, float]], pools: Sequence[Pool]) -> None:
    """Raise `UnfitEnvironmentError` where nodes have no room for all processes: they would wait.

    Args:
        nodes: what each has.
    """
    left = [dict(node) for node in nodes]
    for needs in (pool.needs() for pool in pools for _ in range(pool.processes)):
        room = (n for n in left if all(n.get(name, 0) >= value for name, value in needs.items()))
        if (node := next(room, None)) is None:
            has = "; ".join(", ".join(f"{n.get(own, 0):g} {own}" for own in needs) for n in nodes)
            raise UnfitEnvironmentError(
                f"there is no room for {' and '.join(pool.said() for pool in pools)}, and they "
                f"would wait for ever: the nodes have {has}; give fewer (--encoders, --makers), or "
                "more nodes"
            )
        for name, value in needs.items():
            node[name] -= value


class _Pulse:
    """What each process says that it is at."""

    def __init__(self) -> None:
        self._said: dict[str, tuple[str, str, float]] = {}

    def tell(self, process: str, pool: str, doing: str) -> None:
        self._said[process] = pool, doing, time.time()

    def all(self) -> dict[str, tuple[str, str, float]]:
        return self._said


class Watch:
    """Says what waits for what, where no shard comes for a while."""

    def __init__(self, pools: Sequence[Pool]) -> None:
        self.pulse = ray.remote(num_cpus=0)(_Pulse).remote()
        self._pools, self._at, self._ended = pools, time.monotonic(), threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def shard_came(self) -> None:
        """Count from now on."""
        self._at = time.monotonic()

    def _look(self) -> None:
        while not self._ended.wait(1.0):
            if time.monotonic() - self._at >= SECONDS_UNTIL_SAID:
                warn(f"no shard for {time.monotonic() - self._at:.0f} s: {self._what_waits()}")
                self._at = time.monotonic()

    def _what_waits(self) -> str:
        try:
            told = ray.get(self.pulse.all.remote(), timeout=10)
            free = ray.available_resources()
        except Exception as error:  # of a cluster in trouble, which is what is to be said
            return f"the cluster does not answer ({in_one_line(error)})"
        parts = []
        for pool in self._pools:
            own = [(doing, since) for kind, doing, since in told.values() if kind == pool.name]
            at_work = [f"{doing} for {time.time() - since:.0f} s" for doing, since in own]
            parts.append(f"{len(own)} of {pool.said()} began: {'; '.join(at_work) or 'none'}")
        names = {name for pool in self._pools for name in pool.needs()}
        has = ", ".join(f"{free.get(name, 0):g} {name}" for name in sorted(names))
        return f"{'. '.join(parts)}. Free are {has}"


class _OfPool(ABC):
    """A process of a pool, which says what it is at."""

    pool: ClassVar[str]

    def __init__(self, making: Making, pulse: Any) -> None:
        self._pulse, self._name = pulse, f"{socket.gethostname()}-{os.getpid()}"
        self._tell("opens its stages")
        self._error: StageError | None = None
        try:
            self._do = self._open(making)
        except StageError as error:  # which Ray would tell as one of its own
            self._error = error
        self._tell("waits for a shard")

    @abstractmethod
    def _open(self, making: Making) -> Callable[[dict[str, Any]], Made]:
        """Its stages, as what makes a row of the pool before into a shard."""

    def _tell(self, doing: str) -> None:
        self._pulse.tell.remote(self._name, self.pool, doing)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        if row.get("error"):  # of the pool before
            return row
        self._tell(f"is at shard {row['name']}")
        try:
            if self._error is not None:
                raise self._error
            made = self._do(row).to_row()
        except StageError as error:
            made = {"told": "", "files": b"", "error": str(error), "exit_code": error.exit_code}
        self._tell("waits for a shard")
        return {"name": row["name"], "error": "", "exit_code": 0, **made}


class _EncodeShards(_OfPool):
    pool = ENCODING

    def _open(self, making: Making) -> Callable[[dict[str, Any]], Made]:
        encode = Encoder(making)
        return lambda row: encode(Shard.from_json(row["shard"]))


class _MakeShards(_OfPool):
    pool = MAKING

    def _open(self, making: Making) -> Callable[[dict[str, Any]], Made]:
        make = Maker(making)
        return lambda row: make(Made.from_row(row))


def make_shards(
    shards: Sequence[Shard], making: Making, pools: tuple[Pool, Pool]
) -> Iterator[Made]:
    """Have shards made, and give each when it is in its store.

    Processes that die are begun again, with the shards that they had.

    Raises:
        StageError: what stands in the way of more than a row, as the stage's script would end.
    """
    encoding, on_devices = pools
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    asked = [{"name": shard.name, "shard": shard.to_json()} for shard in shards]
    with Watch(pools) as watch:
        own: dict[str, Any] = {"fn_constructor_args": [making, watch.pulse]}
        rows = ray.data.from_items(asked, override_num_blocks=len(asked))
        encoded = rows.map(
            _EncodeShards, compute=_pool_of(encoding, len(asked)), num_cpus=encoding.cpus, **own
        )
        chips: dict[str, Any] = {}
        if on_devices.resource == "GPU":
            chips["num_gpus"] = on_devices.chips
        elif on_devices.resource is not None:
            chips["resources"] = {on_devices.resource: on_devices.chips}
        made = encoded.map(
            _MakeShards,
            compute=_pool_of(on_devices, len(asked)),
            num_cpus=on_devices.cpus,
            **own,
            **chips,
        )
        for row in made.iter_rows():
            watch.shard_came()
            if row["error"]:
                raise error_of(row["exit_code"], row["error"])
            yield Made.from_row(row)


def _pool_of(pool: Pool, shards: int) -> ActorPoolStrategy:
    return ActorPoolStrategy(
        size=min(pool.processes, shards), max_tasks_in_flight_per_actor=MOST_AT_ONCE
    )
