"""The processes of the pools, as Ray Data runs them."""

import os
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.exceptions import RayError, RayTaskError, UserCodeException
from ray.util.metrics import Counter, Histogram

from common.errors import StageError, UnfitEnvironmentError, error_of, in_one_line
from common.scale.host_groups import HostGroup
from common.scale.makers import ENCODING, MAKING, Encoder, Made, Maker, Making
from common.scale.ray_pools import Pool
from common.scale.shards import Shard
from common.scale.sifting import Ends
from common.scale.watch import EndsByPulse, Watch

# Makes a row of the pool before into a shard, whose rows processes may have ended at.
Do = Callable[[dict[str, Any], Ends | None], Made]
MOST_STARTS = 5  # of a process that dies while it opens its stages
BEGUN_UNTIL_ALONE = 3  # times of a shard, by processes that ended at it; then row by row
MOST_BEGUN = 20
MOST_AT_ONCE = 2  # shards that wait at a process, or are in it
SECONDS_BETWEEN_ASKING = 0.1
SECONDS_OF_SHARDS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)  # limits of a histogram


class _Metrics:
    """What Prometheus reads at each node of Ray, by pool."""

    def __init__(self, pool: str) -> None:
        tags = {"pool": pool}
        self._pictures = Counter(
            "staged_diffusion_pictures", "Pictures of shards that a pool has done.", ("pool",)
        )
        self._failures = Counter(
            "staged_diffusion_failed_rows", "Rows without pictures.", ("pool",)
        )
        self._seconds = Histogram(
            "staged_diffusion_shard_seconds",
            "Seconds of a pool's process at a shard.",
            [*SECONDS_OF_SHARDS],
            ("pool",),
        )
        for metric in (self._pictures, self._failures, self._seconds):
            metric.set_default_tags(tags)
        self._pool = pool

    def count(self, made: Made) -> None:
        if self._pool not in made.seconds:  # it was there already
            return
        self._pictures.inc(made.shard.images)
        self._seconds.observe(made.seconds[self._pool])
        if self._pool == MAKING and made.failures:
            self._failures.inc(len(made.failures))


class _OfPool(ABC):
    """A process of a pool, which says what it is at."""

    pool: ClassVar[str]

    def __init__(self, making: Making, pulse: Any, of: Pool) -> None:
        self._pulse, self._name = pulse, f"{socket.gethostname()}-{os.getpid()}"
        self._of, self._metrics = of, _Metrics(self.pool)
        self._tell("opens its stages")
        self._error: StageError | None = None
        try:
            self._do = self._open(making)
        except StageError as error:  # which Ray would tell as one of its own
            self._error = error
        self._tell("waits for a shard")

    @abstractmethod
    def _open(self, making: Making) -> Do:
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
            found = self._do(row, self._ends_at(row["name"]))
            self._pulse.ends.remote(self.pool, row["name"])
            self._metrics.count(found)
            made = found.to_row()
        except StageError as error:
            made = {"told": "", "files": b"", "error": str(error), "exit_code": error.exit_code}
        self._tell("waits for a shard")
        return {"name": row["name"], "error": "", "exit_code": 0, **made}

    def _ends_at(self, shard: str) -> Ends | None:
        """What is known of a shard's rows, where processes have ended at it.

        Raises:
            UnfitEnvironmentError: again and again, and not at a row alone.
        """
        times = ray.get(self._pulse.begins.remote(self.pool, shard))
        if times > MOST_BEGUN:
            raise UnfitEnvironmentError(
                f"{MOST_BEGUN} processes of {self.pool} ended at shard {shard}: see what ends "
                "them, such as too little memory (--batch_size, --shard_images)"
            )
        return EndsByPulse(self._pulse, self.pool, shard) if times >= BEGUN_UNTIL_ALONE else None


class _EncodeShards(_OfPool):
    pool = ENCODING

    def _open(self, making: Making) -> Do:
        encode = Encoder(making)

        def do(row: dict[str, Any], ends: Ends | None) -> Made:
            while not ray.get(self._pulse.may_encode.remote(row["name"])):
                time.sleep(SECONDS_BETWEEN_ASKING)
            return encode(Shard.from_json(row["shard"]), ends)

        return do


class _MakeShards(_OfPool):
    pool = MAKING

    def _open(self, making: Making) -> Do:
        of = self._of
        make: Do
        if of.hosts > 1:
            make = HostGroup(making, of.hosts, of.needs(), of.topology)
        else:
            alone = Maker(making)

            def make(row: dict[str, Any], ends: Ends | None) -> Made:
                return alone(Made.from_row(row), ends)

        def do(row: dict[str, Any], ends: Ends | None) -> Made:
            made = make(row, ends)
            self._pulse.is_made.remote(row["name"])
            return made

        return do


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
    context.max_consecutive_actor_init_deaths = MOST_STARTS
    asked = [{"name": shard.name, "shard": shard.to_json()} for shard in shards]
    with Watch(pools, ray.get_runtime_context().get_node_id()) as watch:
        rows = ray.data.from_items(asked, override_num_blocks=len(asked))
        encoded = rows.map(
            _EncodeShards,
            fn_constructor_args=[making, watch.pulse, encoding],
            compute=_pool_of(encoding, len(asked)),
            num_cpus=encoding.cpus,
        )
        # The places of several hosts the process asks for itself.
        own = {"num_cpus": 0} if on_devices.hosts > 1 else on_devices.options()
        made = encoded.map(
            _MakeShards,
            fn_constructor_args=[making, watch.pulse, on_devices],
            compute=_pool_of(on_devices, len(asked)),
            **own,
        )
        for row in rows_of(made):
            watch.shard_came()
            if row["error"]:
                raise error_of(row["exit_code"], row["error"])
            yield Made.from_row(row)


def rows_of(dataset: Any) -> Iterator[dict[str, Any]]:
    """A dataset's rows as they come.

    Raises:
        UnfitEnvironmentError: the cluster cannot go on.
    """
    try:
        yield from dataset.iter_rows()
    except RayError as error:
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, UserCodeException) or not isinstance(cause, RayError):
            raise  # a defect of ours
        raise UnfitEnvironmentError(
            f"the cluster cannot go on ({in_one_line(error)}): the same command makes what is "
            "missing"
        ) from None


def _pool_of(pool: Pool, shards: int) -> ActorPoolStrategy:
    least = min(pool.processes, shards)
    most = min(pool.most or shards, shards) if pool.grows else least
    return ActorPoolStrategy(
        min_size=least, max_size=most, max_tasks_in_flight_per_actor=MOST_AT_ONCE
    )
