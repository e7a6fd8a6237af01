"""Processes on several hosts that compute a shard together, as Ray places them."""

import os
import socket
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError
from ray.util.placement_group import (
    get_placement_group,
    placement_group,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from common.errors import StageError, UnfitEnvironmentError, error_of, in_one_line
from common.scale.makers import Follow, Follower, Made, Maker, Making
from common.scale.sifting import Ends

SECONDS_TO_BE_PLACED = 600.0
SECONDS_TO_GIVE_UP = 60.0  # a process that computes, once the first one has failed
WORKER_ID = "ray.io/tpu-worker-id"  # a node's label: its number within its slice
Told = tuple[str, int]  # an error and its exit code; ("", 0): none


def _told(error: StageError | None = None) -> Told:
    return ("", 0) if error is None else (str(error), error.exit_code)


class Member:
    """One of the processes; the first one makes the shard, the others do their part of it."""

    def __init__(self) -> None:
        self._maker: Maker | None = None
        self._follower: Follower | None = None

    def place(self) -> tuple[int, str]:
        """This host's number within its slice, and an address on it that is free."""
        label = ray.get_runtime_context().get_node_labels().get(WORKER_ID, "0")
        host = ray.util.get_node_ip_address()
        with closing(socket.create_server(("", 0))) as free:
            return int(
                label[0] if isinstance(label, list) else label
            ), f"{host}:{free.getsockname()[1]}"

    def open(self, making: Making, others: list[Any]) -> Told:
        """Meet the other processes and open the stages.

        Args:
            making: with the group's `distributed` among its flags.
            others: for the first process, those that it leads.
        """
        try:
            if making.flags["distributed"].endswith(",0"):
                self._maker = Maker(making, [_lead(other) for other in others])
            else:
                self._follower = Follower(making)
        except StageError as error:
            return _told(error)
        return _told()

    def make(self, row: dict[str, Any], ends: Ends | None) -> tuple[dict[str, Any], Told]:
        """Make a shard; of the first process."""
        assert self._maker is not None
        try:
            return self._maker(Made.from_row(row), ends).to_row(), _told()
        except StageError as error:
            return {}, _told(error)

    def follow(self, number: int, files: dict[str, bytes]) -> Told:
        """Run a stage beside the first process."""
        assert self._follower is not None
        try:
            self._follower(number, files)
        except StageError as error:
            return _told(error)
        return _told()


def _lead(other: Any) -> Follow:
    """How the first process has another one do its part, as `Maker` takes it."""

    def begin(number: int, files: dict[str, bytes]) -> Callable[[bool], None]:
        answer = other.follow.remote(number, files)

        def wait(has_failed: bool) -> None:
            try:
                said, code = ray.get(answer, timeout=SECONDS_TO_GIVE_UP if has_failed else None)
            except (GetTimeoutError, RayActorError):
                os._exit(1)  # what has lost one of them computes no more: all are begun again
            if code and not has_failed:
                raise error_of(code, said)

        return wait

    return begin


class HostGroup:
    """A process on each of several hosts, open for many shards."""

    def __init__(
        self, making: Making, hosts: int, needs: dict[str, float], topology: str | None
    ) -> None:
        """
        Args:
            hosts: how many; of a slice of TPUs it has as many as it has.
            needs: what each asks its node for.
            topology: of a slice, such as v6e:4x4.

        Raises:
            UnfitEnvironmentError: there is no room for it.
            StageError: a process cannot open its stages.
        """
        # One that was begun again has the places that it had before, of which it knows nothing.
        name = f"hosts of {ray.get_runtime_context().get_actor_id()}"
        _give_back(name)
        is_again = ray.get_runtime_context().was_current_actor_reconstructed
        placed, hosts = _place(name, hosts, needs, topology, waits=is_again)
        chips = {name: value for name, value in needs.items() if name not in ("CPU", "GPU")}
        members = [
            ray.remote(Member)
            .options(
                num_cpus=needs.get("CPU", 0),
                num_gpus=needs.get("GPU", 0),
                resources=chips,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placed, placement_group_bundle_index=index
                ),
            )
            .remote()
            for index in range(hosts)
        ]
        self._name = name
        places = self._get([member.place.remote() for member in members])
        order = sorted(range(hosts), key=lambda each: places[each][0])
        self._members = [members[each] for each in order]
        address = places[order[0]][1]
        answers = []
        for index, member in enumerate(self._members):
            flags = {**making.flags, "distributed": f"{address},{hosts},{index}"}
            others = self._members[1:] if index == 0 else []
            answers.append(member.open.remote(replace(making, flags=flags), others))
        for said, code in self._get(answers):
            if code:
                raise error_of(code, said)

    def __call__(self, row: dict[str, Any], ends: Ends | None) -> Made:
        """Make a shard."""
        made, (said, code) = self._get(self._members[0].make.remote(row, ends))
        if code:
            raise error_of(code, said)
        return Made.from_row(made)

    def _get(self, answers: Any) -> Any:
        """What members answer. Where one is lost Ray begins this process again, and it the others.

        Their places are given back first: Ray keeps them for as long as the list is made.
        """
        try:
            return ray.get(answers)
        except RayActorError:
            _give_back(self._name)
            os._exit(1)


def _place(
    name: str, hosts: int, needs: dict[str, float], topology: str | None, *, waits: bool
) -> tuple[Any, int]:
    """Places on as many nodes, those of one slice where it is one. Returns how many they are, too.

    Args:
        name: of the places.
        waits: for as long as it takes: a host that went comes again, or another slice does.
    """
    seconds = None if waits else SECONDS_TO_BE_PLACED
    own = {"strategy": "STRICT_SPREAD", "name": name}
    try:
        if topology is None:
            placed = placement_group([needs] * hosts, **own)
            ray.get(placed.ready(), timeout=seconds)
        else:
            from ray.util.tpu import slice_placement_group

            version, _, form = topology.partition(":")
            while True:
                try:
                    whole = slice_placement_group(form, version, **own)
                    break
                except TimeoutError:  # after a minute or two
                    if not waits:
                        raise
            placed, hosts = whole.slice_placement_group, whole.num_hosts
            ray.get(placed.ready(), timeout=seconds)
            whole.release_head_pgs()  # which chose the slice
    except (ValueError, RuntimeError, TimeoutError, GetTimeoutError) as error:
        raise UnfitEnvironmentError(
            f"there is no room for {topology or f'{hosts} hosts that compute together'} "
            f"({in_one_line(error) or 'waited in vain'}): give fewer, or more nodes"
        ) from None
    return placed, hosts


def _give_back(name: str) -> None:
    """Let places go, and the processes in them."""
    with suppress(ValueError):  # there are none
        remove_placement_group(get_placement_group(name))
