"""Several processes that compute together meet at one address."""

import socket
import threading
from typing import Any

import jax
import pytest

from common.compute import processes
from common.compute.processes import is_first_process, join_processes, meet_at
from common.errors import BadSettingError, UnfitEnvironmentError
from tests.refusals import refusal


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        return int(server.getsockname()[1])


def test_one_process_waits_until_the_first_one_is_there() -> None:
    port = free_port()
    waiting = threading.Thread(
        target=meet_at, args=(f"localhost:{port}",), kwargs={"is_first": False}
    )
    waiting.start()
    assert waiting.is_alive()
    with socket.create_server(("localhost", port)):
        waiting.join(timeout=30)
    assert not waiting.is_alive()
    meet_at(f"localhost:{port}", is_first=True)  # the port is free for jax's own server


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("auto", {}),
        (
            "host.example:80,4,3",
            {"coordinator_address": "host.example:80", "num_processes": 4, "process_id": 3},
        ),
        ("[::1]:80,2,0", {"coordinator_address": "[::1]:80", "num_processes": 2, "process_id": 0}),
    ],
)
def test_jax_is_told_who_takes_part(
    text: str, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[dict[str, Any]] = []
    met: list[tuple[str, bool]] = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: told.append(given))
    monkeypatch.setattr(
        processes, "meet_at", lambda address, is_first: met.append((address, is_first))
    )
    join_processes(text)
    assert told == [expected]
    address = expected.get("coordinator_address")
    assert met == ([] if address is None else [(address, expected["process_id"] == 0)])


@pytest.mark.parametrize(
    "text", ["", "host", "host:1", "host:1,2", "host:1,2,2", "host:1,0,0", "host:99999,2,0", ":1,2"]
)
def test_what_is_not_understood(text: str) -> None:
    with pytest.raises(BadSettingError, match=r"--distributed .* is not understood"):
        join_processes(text)


def test_a_process_alone_writes() -> None:
    assert is_first_process()


@pytest.mark.parametrize(
    "error",
    [
        ValueError("coordinator_address should be defined."),
        RuntimeError("jax.distributed.initialize() must be\ncalled before any JAX calls"),
    ],
)
def test_processes_that_do_not_find_each_other(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """jax's own errors, for no test may wait for a cluster."""
    place = "auto"

    def refuse(**_: object) -> None:
        raise error

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    with refusal(
        UnfitEnvironmentError,
        f"--distributed {place}: the processes do not find each other",
        " ".join(str(error).split()),
        "HOST:PORT,COUNT,INDEX",
    ):
        processes.join_processes(place)


def test_a_first_process_that_does_not_answer() -> None:
    address = f"localhost:{free_port()}"
    with refusal(UnfitEnvironmentError, f"{address} does not answer", "start the first process"):
        processes.meet_at(address, is_first=False, patience=0.1)


def test_an_address_that_is_none() -> None:
    with refusal(UnfitEnvironmentError, "nosuch.invalid:1234 cannot be used", "a free port"):
        processes.meet_at("nosuch.invalid:1234", is_first=False)
    with refusal(BadSettingError, "--distributed localhost:99999,2,0 is not understood"):
        processes.join_processes("localhost:99999,2,0")


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
        processes.meet_at(address, is_first=False)  # somebody answers
        with refusal(UnfitEnvironmentError, f"{address} cannot be used", "in use"):
            processes.meet_at(address, is_first=True)
