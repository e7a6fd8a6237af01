"""Requests that are made to do harm: each is refused in a sentence, and nothing is left."""

import asyncio
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode

from common.serving.catalog import Catalog
from common.serving.http_app import make_app
from common.serving.service import MOST_LISTED, Bounds, Service

KEY = {"Authorization": "Bearer secret"}
HOW = settings(
    max_examples=40,  # requests to each route
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
MOST_SAID = 2000  # bytes
ENDLESS = re.compile("/events$")
INNER_WORDS = re.compile(r"Traceback|\w+Error\b|/(home|root|tmp|usr)/|site-packages|a defect of")


def application(folder: Path) -> tuple[FastAPI, Service]:
    """All routes before a queue that takes nothing: what is refused is refused before that."""
    service = Service(folder / "jobs", {}, Bounds(waiting=0, body_bytes=200_000))
    return make_app(service, Catalog(own_model="models/demo"), "secret", lambda: True), service


@pytest.mark.slow
def test_ten_thousand_jobs_are_asked_for_at_once(tmp_path: Path) -> None:
    """As many wait as may, the others are refused in a sentence, and memory stays as it is."""
    service = Service(tmp_path / "jobs", {}, Bounds())
    app = make_app(service, Catalog(own_model="models/demo"), None, lambda: True)
    process = psutil.Process()

    async def ask() -> tuple[Counter[int], set[str], int]:
        statuses, said = Counter[int](), set[str]()
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            await client.get("/healthz")
            before = process.memory_info().rss
            for first in range(0, 10_000, 100):
                bodies = [{"prompt": f"star {first + number}"} for number in range(100)]
                answers = await asyncio.gather(*(client.post("/jobs", json=b) for b in bodies))
                statuses.update(answer.status_code for answer in answers)
                said.update(a.json()["error"]["message"] for a in answers if a.is_error)
            assert len((await client.get("/jobs")).json()) == MOST_LISTED
            assert (await client.get("/metrics")).status_code == 200
            return statuses, said, process.memory_info().rss - before

    statuses, said, grown = asyncio.run(ask())
    service.close()
    assert statuses == {202: 1000, 429: 9000}
    assert said == {"1000 jobs wait, as many as may: try again later"}
    assert grown < 100e6


@pytest.mark.slow
def test_whatever_is_asked_is_answered_in_a_sentence(tmp_path: Path) -> None:
    app, service = application(tmp_path)
    schema = schemathesis.openapi.from_asgi("/openapi.json", app, headers=KEY)
    asked = dict[str, int]()
    for found in schema.exclude(path_regex=ENDLESS.pattern).get_all_operations():
        operation = found.ok()

        @HOW
        @given(case=operation.as_strategy() | operation.as_strategy(GenerationMode.NEGATIVE))
        def ask(case: Any) -> None:
            answer = case.call(headers=KEY)
            asked[case.operation.label] = asked.get(case.operation.label, 0) + 1
            assert answer.status_code < 500, f"{case.as_curl_command()}: {answer.text[:300]}"
            if answer.status_code >= 400 and answer.content:
                said = json.dumps(answer.json(), ensure_ascii=False)
                assert not INNER_WORDS.search(said), said[:300]
                assert len(answer.content) < MOST_SAID

        ask()
    service.close()
    assert len(asked) > 30 and sum(asked.values()) > 5 * len(asked)
    assert not [*(tmp_path / "jobs" / "runs").iterdir()]
