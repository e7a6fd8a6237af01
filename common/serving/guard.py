"""In front of all routes: who may ask, and how much at once."""

import asyncio
import base64
import binascii
import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common.errors import shorten
from common.serving import a1111_api
from common.serving.service import Bounds

OPEN_TO_ALL = ("/healthz", "/readyz", "/")  # without the key: they tell nothing
READING = ("GET", "HEAD", "OPTIONS")
MOST_SAID = 300  # characters of an error
REQUESTS_WITHOUT_BODIES = 100  # beyond those that `Bounds` allows
# By which a browser reaches a server of this machine; another name may be a page's that has turned
# its own name into this machine's address.
LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")


def failure(status: int, sentence: str, path: str) -> JSONResponse:
    """An error as clients read it: OpenAI's, or those of AUTOMATIC1111's API.

    Only what may pass is to be tried again.

    Args:
        path: that was asked for.
    """
    said = shorten(sentence, MOST_SAID)
    kind = "invalid_request_error" if status < 500 else "server_error"
    retry = "true" if status in (429, 503) else "false"
    content: dict[str, Any] = {
        "error": {"message": said, "type": kind, "param": None, "code": None}
    }
    if path.startswith(a1111_api.PREFIX):
        content = {"error": kind, "detail": said, "body": "", "errors": said}
    return JSONResponse(content, status, {"x-should-retry": retry})


def key_in(authorization: bytes) -> bytes:
    """The key that a request has: as a bearer's, or as the password of any user."""
    scheme, _, given = authorization.partition(b" ")
    if scheme.lower() == b"bearer":
        return given
    if scheme.lower() != b"basic":
        return b""
    try:
        return base64.b64decode(given, validate=True).partition(b":")[2]
    except binascii.Error:
        return b""


class _RefusedError(Exception):
    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status, self.sentence = status, sentence


@dataclass
class _Held:
    """Of a request."""

    bytes: int = 0


class Guard:
    """Refuses requests without the key, and reads the bodies of others, so that none holds memory
    for as long as it likes: the application gets whole ones.
    """

    def __init__(self, app: ASGIApp, bounds: Bounds, api_key: str | None) -> None:
        self._app, self._bounds, self._key = app, bounds, api_key
        self._requests, self._held = 0, 0  # at once; bytes of their bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        held, self._requests = _Held(), self._requests + 1
        try:
            self._refuse(scope)
            body = await self._read(receive, held)
            if body is not None:  # else nobody waits for an answer
                await self._app(scope, _with(body, receive), send)
        except _RefusedError as error:
            answer = failure(error.status, error.sentence, scope["path"])
            if error.status == 408:  # others may send the rest, which nobody keeps
                answer.headers["connection"] = "close"
            await answer(scope, receive, send)
        finally:
            self._requests -= 1
            self._held -= held.bytes

    def _refuse(self, scope: Scope) -> None:
        headers, most = dict(scope["headers"]), self._bounds.body_bytes
        has_body = _has_body(scope)
        is_open = scope["path"] in OPEN_TO_ALL and scope["method"] in READING and not has_body
        wanted = None if self._key is None or is_open else self._key.encode()
        given = key_in(headers.get(b"authorization", b""))
        if wanted is not None and not hmac.compare_digest(given, wanted):
            raise _RefusedError(401, "give the server's key: Authorization: Bearer KEY")
        host = headers.get(b"host", b"").decode("latin-1")
        if self._key is None and re.sub(r":\d+$", "", host) not in LOCAL_NAMES:
            said = "without a key the server answers for this machine's own names alone"
            raise _RefusedError(400, said)
        if scope["method"] not in READING and _is_of_another_site(headers, host):
            raise _RefusedError(403, "a page of another site asks for this")
        # Some are left to look and to cancel; what is open is answered whatever else is asked for.
        others = 0 if has_body else REQUESTS_WITHOUT_BODIES
        if self._requests > self._bounds.requests + others and not is_open:
            said = f"{self._bounds.requests} requests are being answered: ask again later"
            raise _RefusedError(503, said)
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > most:
            raise _RefusedError(413, f"the request's body is longer than {most} bytes")

    async def _read(self, receive: Receive, held: "_Held") -> bytes | None:
        """A request's body, or None where its client has gone; how much of it is held is told."""
        bounds, body = self._bounds, bytearray()
        try:
            async with asyncio.timeout(bounds.body_seconds):
                while (message := await receive())["type"] == "http.request":
                    part = message.get("body", b"")
                    body += part
                    held.bytes += len(part)
                    self._held += len(part)
                    if held.bytes > bounds.body_bytes:
                        said = f"the request's body is longer than {bounds.body_bytes} bytes"
                        raise _RefusedError(413, said)
                    if self._held > bounds.held_bytes:
                        said = (
                            "other requests' bodies take all the memory for them: ask again later"
                        )
                        raise _RefusedError(503, said)
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            said = f"the request's body did not come within {bounds.body_seconds:g} s"
            raise _RefusedError(408, said) from None
        return None


def _has_body(scope: Scope) -> bool:
    """Whether a request says that it has one."""
    headers = dict(scope["headers"])
    return b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"


def _with(body: bytes, receive: Receive) -> Receive:
    """What an application receives of a request that was read."""
    is_told = False

    async def receive_again() -> Message:
        nonlocal is_told
        if is_told:
            return await receive()  # until its client goes
        is_told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again


def _is_of_another_site(headers: Mapping[bytes, bytes], host: str) -> bool:
    """Whether a browser says that another site's page asks."""
    site = headers.get(b"sec-fetch-site")
    if site is not None:  # behind a proxy the host may be another one than the page's
        return site not in (b"same-origin", b"none")
    origin = headers.get(b"origin", b"").decode("latin-1")
    return bool(origin) and origin.partition("://")[2] != host
