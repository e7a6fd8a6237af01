"""What a server may do to a stage that asks it for its VAE; the real one is in tests/serving."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest

from common.compute.backends import RemoteVae
from common.compute.clock import StageReport
from common.compute.kept import Kept
from common.compute.options import API_KEY, RunOptions
from common.errors import BadSettingError, NotFiniteError, StageError, UnfitEnvironmentError
from common.models.checkpoint import Checkpoint
from common.vae.decoder import Decoder
from common.vae.loading import open_decoder, open_encoder
from tests.refusals import refusal
from tests.vae.tiny_vae import random_latents, to_load

LATENTS = random_latents(1, 4, 4, 4)
PIXELS = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(1, 8, 8, 3)


@contextmanager
def answering(status: int, body: bytes, headers: dict[str, str]) -> Iterator[tuple[str, list[Any]]]:
    """A server that gives one answer; its address, and what it was asked."""
    asked: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            given = self.rfile.read(int(self.headers["content-length"]))
            asked.append((self.path, dict(self.headers), given))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nobody is told."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def decoder_of(checkpoint: Checkpoint, url: str) -> Decoder:
    options, vae = RunOptions(remote_vae=url), to_load(checkpoint)
    report = StageReport(3)
    return open_decoder(Kept(), RemoteVae.name, vae, [LATENTS.shape], options, report)


def headers_of(checkpoint: Checkpoint, **other: str) -> dict[str, str]:
    own = {"vae": checkpoint.weights_fingerprint("vae"), "vae_dtype": "float32"}
    return own | {"shape": json.dumps(PIXELS.shape), "dtype": "uint8"} | other


def test_what_is_asked_and_given(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(API_KEY, "secret")
    with answering(200, PIXELS.tobytes(), headers_of(checkpoint)) as (url, asked):
        decoder = decoder_of(checkpoint, f"{url}/")
        pixels, finite = decoder.decode(LATENTS, warm_up=True)
    assert finite and len(asked) == 2  # one of them to warm up
    np.testing.assert_array_equal(pixels, PIXELS)
    path, headers, body = asked[1]
    query = parse_qs(urlsplit(path).query)
    assert urlsplit(path).path == "/decode" and headers["Authorization"] == "Bearer secret"
    assert query["shape"] == ["1", "4", "4", "4"] and query["partial_postprocess"] == ["True"]
    assert query["vae"] == [checkpoint.weights_fingerprint("vae")]
    assert "scaling_factor" not in query and "do_scaling" not in query
    scaled = LATENTS / np.float32(checkpoint.config("vae")["scaling_factor"])
    np.testing.assert_array_equal(np.frombuffer(body, "<f4").reshape(LATENTS.shape), scaled)
    facts = decoder.runner.facts()
    assert (facts["backend"], facts["device"]) == ("remote", url.removeprefix("http://"))
    assert "weights_bytes" not in decoder.runner.report.facts


@pytest.mark.parametrize(
    ("status", "body", "kind", "said"),
    [
        (400, b'{"error": {"message": "too large"}}', BadSettingError, "with 400: too large"),
        (404, b'{"error": "no path"}', BadSettingError, "refuses with 404: no path"),
        (401, b"{}", BadSettingError, f"wants its key: set {API_KEY}"),
        (413, b"<html>", BadSettingError, "refuses with 413: Request Entity Too Large"),
        (302, b"", BadSettingError, "refuses with 302"),
        (422, b'{"error": {"message": "infinite"}}', NotFiniteError, "infinite"),
        (429, b'{"error": {"message": "full"}}', UnfitEnvironmentError, "with 429: full"),
        (500, b"[]", UnfitEnvironmentError, "failed with 500: Internal Server Error"),
    ],
    ids=str,
)
def test_refusals(
    checkpoint: Checkpoint, status: int, body: bytes, kind: type[StageError], said: str
) -> None:
    with answering(status, body, {"location": "http://127.0.0.1:9/decode"}) as (url, asked):
        with refusal(kind, f"--remote_vae {url}", said):
            decoder_of(checkpoint, url).decode(LATENTS)
        assert len(asked) == 1


@pytest.mark.parametrize(
    ("other", "cut", "kind", "said"),
    [
        ({"vae": "of another"}, 0, BadSettingError, "does not say that it has the checkpoint's"),
        ({"vae_dtype": "bfloat16"}, 0, BadSettingError, "does not say that it has"),
        ({"shape": "[1, 3, 8, 8]"}, 0, UnfitEnvironmentError, "gave uint8 of shape [1, 3, 8, 8]"),
        ({"shape": "{}"}, 0, UnfitEnvironmentError, "gave what cannot be read"),
        ({"shape": "["}, 0, UnfitEnvironmentError, "gave what cannot be read"),
        ({"dtype": "int4"}, 0, UnfitEnvironmentError, "gave what cannot be read"),
        ({}, 1, UnfitEnvironmentError, "the body has 191 bytes"),
    ],
    ids=str,
)
def test_answers_that_are_of_no_use(
    checkpoint: Checkpoint, other: dict[str, str], cut: int, kind: type[StageError], said: str
) -> None:
    body = PIXELS.tobytes()[cut:]
    headers = headers_of(checkpoint, **other)
    with answering(200, body, headers) as (url, _), refusal(kind, f"--remote_vae {url}", said):
        decoder_of(checkpoint, url).decode(LATENTS)


def test_a_server_of_others_knows_no_posteriors(checkpoint: Checkpoint) -> None:
    """Hugging Face's gives latents, whatever is asked besides."""
    latents, pictures = np.zeros((1, 4, 4, 4), np.float32), np.zeros((1, 3, 8, 8), np.float32)
    headers = {"shape": json.dumps(latents.shape), "dtype": "float32"}
    vae = to_load(checkpoint)
    for own, kind, said in (
        ({}, BadSettingError, "does not say that it has the checkpoint's VAE"),
        (headers_of(checkpoint) | headers, UnfitEnvironmentError, "of shape [1, 8, 4, 4]"),
    ):
        with answering(200, latents.tobytes(), headers | own) as (url, _):
            options, report = RunOptions(remote_vae=url), StageReport(0)
            encoder = open_encoder(Kept(), RemoteVae.name, vae, pictures.shape, options, report)
            with refusal(kind, said):
                encoder.encode(pictures)


def test_nobody_is_there(checkpoint: Checkpoint) -> None:
    with answering(200, b"", {}) as (url, _):
        pass
    with refusal(UnfitEnvironmentError, f"--remote_vae {url} cannot be reached"):
        decoder_of(checkpoint, url).decode(LATENTS)
