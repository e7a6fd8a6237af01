"""The pools of processes that make shards: how many suit a cluster of Ray, and what they need."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from common.compute.platforms import usable_cores
from common.errors import BadSettingError, UnfitEnvironmentError, in_one_line
from common.messages import say
from common.scale.makers import ENCODING, MAKING

DEVICES = ("TPU", "GPU")  # as Ray names them


@dataclass(frozen=True)
class Pool:
    """Processes of one kind, or groups of them that compute together, each on a host of its own."""

    name: str
    processes: int
    cpus: float  # of each
    resource: str | None = None  # such as TPU
    chips: int = 0  # of it
    hosts: int = 1  # of a group
    topology: str | None = None  # of the slice that a group is, such as v6e:4x4
    grows: bool = False  # as hosts come
    most: int | None = None  # that it grows to

    def needs(self) -> dict[str, float]:
        """What each asks its node for."""
        asked = {"CPU": self.cpus, self.resource: self.chips}
        return {name: float(value) for name, value in asked.items() if name is not None and value}

    def options(self) -> dict[str, Any]:
        """The same, as Ray takes it for an actor."""
        asked: dict[str, Any] = {"num_cpus": self.cpus}
        if self.resource == "GPU":
            asked["num_gpus"] = self.chips
        elif self.resource is not None:
            asked["resources"] = {self.resource: self.chips}
        return asked

    def said(self) -> str:
        parts = ", ".join(f"{value:g} {name}" for name, value in self.needs().items())
        of_hosts = f" on {self.hosts} hosts" if self.hosts > 1 else ""
        most = "more" if self.most is None else f"up to {self.most}"
        grows = f" ({most} as hosts come)" if self.grows else ""
        return f"{self.processes} process(es) of {self.name}{grows}, each{of_hosts} with {parts}"


def join(address: str | None, *, debug: bool = False) -> None:
    """Start Ray on this machine, or join the cluster of an address.

    Args:
        debug: let Ray say all that it has to.

    Raises:
        UnfitEnvironmentError: there is none.
    """
    if not debug:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        for name in ("ray", "ray.data", "ray.serve"):
            logging.getLogger(name).setLevel(logging.ERROR)
    more: dict[str, Any] = {} if address else {"num_cpus": max(2, usable_cores())}
    try:
        joined = ray.init(
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
    if joined.dashboard_url:
        say(f"Ray's dashboard: http://{joined.dashboard_url}")


def hosts_of(asked: str | None) -> tuple[int, str | None]:
    """How many hosts compute together, and the topology of their slice, where they are one.

    Args:
        asked: a number, or a topology such as v6e:4x4; None: each host alone.

    Raises:
        BadSettingError: it is neither.
    """
    if asked is None or asked.isdecimal():
        hosts = 1 if asked is None else int(asked)
        if hosts < 1:
            raise BadSettingError("--together 0: give a number of hosts from 1")
        return hosts, None
    from ray.util.tpu import get_tpu_worker_resources

    version, _, form = asked.partition(":")
    try:
        hosts, _ = get_tpu_worker_resources(topology=form, accelerator_type=version)
    except (ValueError, LookupError) as error:
        raise BadSettingError(
            f"--together {asked} is neither a number of hosts nor a slice such as v6e:4x4 "
            f"({in_one_line(error)})"
        ) from None
    return hosts, asked


def on_node(node: str) -> NodeAffinitySchedulingStrategy:
    """A place on a node, by its id, and nowhere else."""
    return NodeAffinitySchedulingStrategy(node, soft=False)


def _nodes() -> list[dict[str, float]]:
    """What each node has."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def free_of(pools: Sequence[Pool]) -> str:
    """What of the cluster's resources that processes ask for is free, in words.

    Raises:
        RayError: the cluster does not answer.
    """
    free = ray.available_resources()
    names = sorted({name for pool in pools for name in pool.needs()})
    return f"free are {', '.join(f'{free.get(name, 0):g} {name}' for name in names)}"


def chips_of_hosts(asked: str | None = None) -> tuple[str | None, int]:
    """The resource that processes on devices ask for, and how much of it each host has.

    Args:
        asked: that of hosts which are to come, such as TPU:8; None: of those that are there.

    Raises:
        BadSettingError: it is none.
    """
    if asked is not None:
        name, _, count = asked.partition(":")
        if name not in DEVICES or not count.isdecimal() or not int(count):
            raise BadSettingError(
                f"--host_chips {asked}: give what a host has, such as TPU:8 or GPU:1"
            )
        return name, int(count)
    nodes = _nodes()
    resource = next((name for name in DEVICES if any(name in node for node in nodes)), None)
    if resource is None:
        return None, 0
    return resource, int(min(node[resource] for node in nodes if node.get(resource)))


def pools_for(
    encoders: int | None,
    makers: int | None,
    together: tuple[int, str | None] = (1, None),
    host_chips: str | None = None,
) -> tuple[Pool, Pool]:
    """Those of stage 1 and of the stages on devices, that suit the cluster's nodes.

    Args:
        encoders, makers: how many processes, or groups, are asked for; on TPUs and GPUs as many
            makers as hosts come, where each computes alone.
        together: as `hosts_of` says.
        host_chips: as `chips_of_hosts` takes it; hosts may be there later.

    Raises:
        BadSettingError: TPUs of several hosts compute together as a slice alone.
        UnfitEnvironmentError: no node has room for one, or not all of them fit.
    """
    nodes, (hosts, topology) = _nodes(), together
    resource, chips = chips_of_hosts(host_chips)
    if resource == "TPU" and hosts > 1 and topology is None:
        raise BadSettingError(f"--together {hosts}: name the slice, such as v6e:4x4")
    if resource is not None:
        there = [node for node in nodes if node.get(resource, 0) >= chips]
        groups = max(1, len(there) // hosts)
        # Without a claim to CPUs, which those of stage 1 may all have taken on its host.
        making = Pool(MAKING, makers or groups, 0, resource, chips, hosts, topology)
        if hosts == 1:
            least = min(groups, makers or groups)
            making = replace(making, processes=least, grows=least != makers, most=makers)
        free = sum(node.get("CPU", 0) for node in nodes)
        encoding = Pool(ENCODING, encoders or max(1, int(free) // 8), 1)
    else:
        groups = makers or max(1, len(nodes) // hosts)
        making = Pool(MAKING, groups, 1, hosts=hosts, topology=topology)
        encoding = Pool(ENCODING, encoders or 1, 1)
    is_to_come = host_chips is not None and hosts == 1 and not there
    refuse_too_little(nodes, [encoding] if is_to_come else [encoding, making])
    return encoding, making


def refuse_too_little(nodes: Sequence[Mapping[str, float]], pools: Sequence[Pool]) -> None:
    """Raise `UnfitEnvironmentError` where nodes have no room for all processes: they would wait.

    Args:
        nodes: what each has.
    """
    left = [dict(node) for node in nodes]
    for own in (pool for pool in pools for _ in range(pool.processes)):
        needs = own.needs()
        fit = [n for n in left if all(n.get(name, 0) >= value for name, value in needs.items())]
        if len(fit) < own.hosts:
            has = "; ".join(
                ", ".join(f"{n.get(name, 0):g} {name}" for name in needs) for n in nodes
            )
            raise UnfitEnvironmentError(
                f"there is no room for {' and '.join(pool.said() for pool in pools)}, and they "
                f"would wait for ever: the nodes have {has}; give fewer (--encoders, --makers), or "
                "more nodes"
            )
        for node in fit[: own.hosts]:
            for name, value in needs.items():
                node[name] -= value
