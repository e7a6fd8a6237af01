"""Who may ask, and how much at once: before an application, and of a real server's sockets."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import uvicorn
from fastapi.testclient import TestClient

from common.serving.catalog import Catalog
from common.serving.http_app import make_app
from common.serving.service import Bounds, Service
from tests.serving.conftest import KEY

URL = "/v1/images/generations"


def test_without_the_key_nothing_is_told(keyed: TestClient) -> None:
    wrong = ("Bearer secres", "Bearer ü", "secret", "Basic secret", "Bearer")
    for headers in ({}, *({"Authorization": each} for each in wrong)):
        encoded = {name: value.encode("latin-1") for name, value in headers.items()}
        answer = keyed.get("/jobs", headers=encoded)
        assert answer.status_code == 401 and "server's key" in answer.json()["error"]["message"]
    for scheme in ("Bearer", "bearer"):
        assert keyed.get("/jobs", headers={"Authorization": f"{scheme} secret"}).json() == []
    assert keyed.get("/healthz").json() == {"ok": True}
    for path in ("/healthz", "/"):  # no body is read of who has no key
        assert keyed.post(path, content=b"a").status_code == 401
        assert keyed.request("GET", path, content=b"a").status_code == 401
    assert keyed.get("/readyz").status_code == 503


def test_clients_of_web_uis_have_the_key_as_a_password(keyed: TestClient) -> None:
    for user in ("", "anyone"):
        assert keyed.get("/sdapi/v1/scripts", auth=(user, "secret")).status_code == 200
    for headers in ({}, {"Authorization": "Basic ?"}, {"Authorization": "Basic c2VjcmV0"}):
        assert keyed.get("/sdapi/v1/scripts", headers=headers).status_code == 401
    wrong = keyed.get("/sdapi/v1/scripts", auth=("secret", "secre"))
    assert wrong.status_code == 401 and "server's key" in wrong.json()["detail"]


def test_long_bodies_are_refused(keyed: TestClient) -> None:
    body = b'{"prompt": "' + b"a" * 3000 + b'"}'
    url = "/v1/images/generations"
    answer = keyed.post(url, content=body, headers=KEY)
    assert answer.status_code == 413 and "longer than 2000 bytes" in answer.text

    def in_parts() -> Iterator[bytes]:  # which tell no length before
        yield from (body[start : start + 500] for start in range(0, len(body), 500))

    answer = keyed.post(url, content=in_parts(), headers=KEY)
    assert answer.status_code == 413 and "longer than 2000 bytes" in answer.text
    odd = keyed.post(url, content=b"{", headers={**KEY, "content-length": "x"})
    assert odd.status_code in (400, 413)


@contextmanager
def listening(folder: Path, bounds: Bounds) -> Iterator[str]:
    """The address of a server whose jobs nobody does."""
    service = Service(folder / "jobs", {}, bounds)
    app = make_app(service, Catalog(own_model="models/demo"), None, lambda: True)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
            service.close()


def slow_client(address: str, length: int, sent: bytes = b"{") -> socket.socket:
    """A connection whose body has begun, and which says that it is longer."""
    host, port = address.split(":")
    found = socket.create_connection((host, int(port)), timeout=30)
    head = f"POST {URL} HTTP/1.1\r\nHost: {address}\r\nContent-Length: {length}\r\n"
    found.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + sent)
    return found


def test_who_sends_for_too_long_is_told_and_left(tmp_path: Path) -> None:
    with listening(tmp_path, Bounds(body_seconds=0.5)) as address:
        clients = [slow_client(address, 2000) for _ in range(100)]
        until = time.monotonic() + 2  # some go on, a byte at a time
        while time.monotonic() < until:
            for client in clients[:10]:
                try:
                    client.sendall(b" ")
                except OSError:  # it has been left
                    until = 0
            time.sleep(0.1)
        assert httpx.get(f"http://{address}/healthz").json() == {"ok": True}
        for client in clients[10:]:
            with client.makefile("rb") as file:
                answer = file.read()  # to its end
            assert answer.startswith(b"HTTP/1.1 408") and b"did not come within 0.5 s" in answer
        for client in clients:
            client.close()


def test_bodies_take_no_more_memory_than_is_said(tmp_path: Path) -> None:
    bounds = Bounds(body_bytes=8_000_000, held_bytes=40_000_000, requests=50)
    process = psutil.Process()
    with listening(tmp_path, bounds) as address:
        httpx.get(f"http://{address}/healthz")
        before = process.memory_info().rss
        half = b" " * 4_000_000
        clients = [slow_client(address, 8_000_000, half) for _ in range(16)]
        ended, until = list[socket.socket](), time.monotonic() + 30
        while len(ended) < 6 and time.monotonic() < until:  # ten are held
            left = [client for client in clients if client not in ended]
            ended += [client for client in left if is_answered(client, b"HTTP/1.1 503")]
        assert len(ended) == 6
        assert process.memory_info().rss - before < 2.5 * 40e6
        waiting = [client for client in clients if client not in ended]
        waiting += [slow_client(address, 3, b"") for _ in range(50 - len(waiting))]
        answer = asked(address, lambda answer: answer.status_code == 503)
        assert "50 requests" in answer.json()["error"]["message"]
        for path in ("/healthz", "/jobs"):  # which can be asked all the same
            assert httpx.get(f"http://{address}{path}").status_code == 200
        for client in waiting:
            client.close()
        asked(address, lambda answer: answer.status_code == 400)  # what they held is free again
        body = b'{"prompt": 3' + half
        for _ in range(20):
            answer = httpx.post(f"http://{address}{URL}", content=body, timeout=30)
            assert answer.status_code == 400


def asked(address: str, until: Callable[[httpx.Response], bool]) -> httpx.Response:
    """The first answer to a request that is none that is as it should be."""
    end = time.monotonic() + 30
    while not until(answer := httpx.post(f"http://{address}{URL}", content=b"{")):
        assert time.monotonic() < end, answer.text
    return answer


def is_answered(client: socket.socket, with_: bytes) -> bool:
    """Whether an answer is there."""
    client.settimeout(0.05)
    try:
        return client.recv(len(with_)) == with_
    except TimeoutError:
        return False
