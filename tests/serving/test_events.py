"""How jobs go, as streams over real HTTP tell it."""

import asyncio
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from common.serving.events import JobEvents
from common.serving.job_queue import JobQueue
from common.serving.jobs import Step
from common.serving.service import Bounds, Service
from tests.serving.conftest import Server, start_server

PICTURE = {"prompt": "a red star", "settings": {"seed": 4, "num_inference_steps": 6}}


def told(answer: httpx.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    """The events of a stream, as they come."""
    name = ""
    for line in answer.iter_lines():
        field, _, value = line.partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            yield name, json.loads(value)


def submit(server: Server, **changes: Any) -> str:
    answer = httpx.post(f"{server.url}/jobs", json=PICTURE | changes, timeout=60)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def test_a_job_that_ends_between_two_looks_is_told(tmp_path: Path) -> None:
    async def listen() -> list[str]:
        service = Service(tmp_path / "jobs", {})
        queue = JobQueue(tmp_path / "jobs")
        before, after = (queue.add(tmp_path / name, [Step(1, [])]) for name in ("before", "after"))
        queue.end(queue.claim([1], "worker") or before, 2, "too early")
        queue.cancel(after.number)
        stream = JobEvents(service).listen()
        found = [await anext(stream)]
        job = queue.add(tmp_path / "quick", [Step(1, [])])
        queue.end(queue.claim([1], "worker") or job, 2, "no such thing")
        found.append(await asyncio.wait_for(anext(stream), 10))
        await stream.aclose()
        queue.close()
        service.close()
        return found

    begin, event = asyncio.run(listen())
    assert begin.startswith(": ")
    assert event == 'event: failed\ndata: {"id": "quick", "error": "no such thing"}\n\n'


def test_a_stream_that_is_bounded_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.serving.events.SECONDS_BETWEEN_PINGS", 0.05)

    async def listen() -> list[str]:
        service = Service(tmp_path / "jobs", {}, Bounds(events_seconds=0.3))
        found = [line async for line in JobEvents(service).listen()]
        service.close()
        return found

    begin, *pings = asyncio.run(asyncio.wait_for(listen(), 20))
    assert begin.startswith(": ") and {*pings} == {": still here\n\n"}


@pytest.mark.slow
def test_a_job_is_told_from_the_queue_to_its_pictures(server: Server) -> None:
    with httpx.stream("GET", f"{server.url}/events", timeout=60) as of_all:
        assert of_all.headers["content-type"].startswith("text/event-stream")
        assert of_all.headers["cache-control"] == "no-store"
        assert of_all.headers["x-accel-buffering"] == "no"
        events = told(of_all)
        job = submit(server)
        seen = []
        for name, data in events:
            if data.get("id") == job:
                seen.append((name, data))
            if seen and seen[-1][0] == "done":
                break
    names = [name for name, _ in seen]
    assert names == sorted(names, key=["queued", "progress", "done"].index)
    stages = list(dict.fromkeys(data["stage"] for name, data in seen if name == "progress"))
    assert [stage for stage in stages if stage != 0] == [s for s in (1, 2, 3) if s in stages]
    assert all(data["steps"] in (None, 6) for _, data in seen if data.get("stage") == 2)
    done = seen[-1][1]
    picture = httpx.get(f"{server.url}{done['pictures'][0]}")
    assert picture.content.startswith(b"\x89PNG")
    whole = httpx.get(f"{server.url}/jobs/{job}").json()
    walls = {str(report["stage"]): report["wall_seconds"] for report in whole["reports"]}
    assert done["seconds"] == walls and walls.keys() == {"1", "2", "3"}
    # Of one that has ended its end is told, and the stream ends by itself.
    with httpx.stream("GET", f"{server.url}/jobs/{job}/events", timeout=60) as of_one:
        assert [*told(of_one)] == [("done", done)]


@pytest.mark.slow
def test_the_lineage_has_settings_and_files_and_no_folders(server: Server) -> None:
    job = submit(server, negative_prompt="a/b /c/d")
    with httpx.stream("GET", f"{server.url}/jobs/{job}/events", timeout=60) as answer:
        assert [name for name, _ in told(answer)][-1] == "done"
    text = httpx.get(f"{server.url}/jobs/{job}").text
    found = json.loads(text)
    assert found["settings"]["seed"] == 4 and found["settings"]["num_inference_steps"] == 6
    assert found["settings"]["prompts"][0]["negative_prompt"] == "a/b /c/d"
    assert found["images"] == [{"index": 0, "prompt": "a red star", "seed": 4}]
    run_dir = server.jobs_dir / "runs" / job
    sizes = {each["file"]: each["bytes"] for each in found["artifacts"]}
    assert sizes["output_image.png"] == (run_dir / "output_image.png").stat().st_size
    assert str(server.jobs_dir) not in text


@pytest.mark.slow
def test_failed_and_cancelled_jobs_say_so(server: Server) -> None:
    with httpx.stream("GET", f"{server.url}/events", timeout=60) as of_all:
        events = told(of_all)
        cancelled = submit(server, settings={"num_inference_steps": 150})
        httpx.delete(f"{server.url}/jobs/{cancelled}")
        assert next(name for name, d in events if d.get("id") == cancelled and "stage" not in d
                    and name != "queued") == "cancelled"  # fmt: skip
        httpx.delete(f"{server.url}/jobs/{cancelled}")
    assert httpx.get(f"{server.url}/jobs/{cancelled}/events").status_code == 404


@pytest.mark.slow
def test_a_hundred_streams_leave_nothing_open(server: Server) -> None:
    process = psutil.Process(server.process.pid)
    with httpx.Client(timeout=60) as client:
        client.get(f"{server.url}/healthz")
        before = process.num_fds()
        for _ in range(5):
            streams = [client.stream("GET", f"{server.url}/events") for _ in range(20)]
            answers = [stream.__enter__() for stream in streams]
            assert {answer.status_code for answer in answers} == {200}
            assert process.num_fds() >= before + 19
            for stream in streams:
                stream.__exit__(None, None, None)
    until = time.monotonic() + 20
    while process.num_fds() > before:
        assert time.monotonic() < until, (process.num_fds(), before)
        time.sleep(0.1)


@pytest.mark.slow
def test_streams_end_with_the_server(tmp_path: Path) -> None:
    own = start_server(tmp_path / "jobs")
    with httpx.stream("GET", f"{own.url}/events", timeout=60) as of_all:
        events = told(of_all)
        job = submit(own, settings={"num_inference_steps": 150})
        while next(events)[1].get("id") != job:
            pass
        began = time.monotonic()
        os.kill(own.process.pid, signal.SIGTERM)
        assert [*events][-1] == ("shutdown", {})
        assert time.monotonic() - began < 9  # by itself, before the server would cut it
    assert own.process.wait(60) == 143
    assert len(JobQueue(own.jobs_dir).jobs()) == 1
