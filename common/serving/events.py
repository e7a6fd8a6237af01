"""Server-sent events: how jobs go, as it happens.

https://html.spec.whatwg.org/multipage/server-sent-events.html. Browsers open at most six
connections to a host, so that a page with all its tabs needs `/events`, one stream of all jobs;
`/jobs/ID/events` is for programs that wait for one.
"""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from fastapi import APIRouter
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException

from common.errors import UnfitEnvironmentError
from common.serving.jobs import Job, State
from common.serving.lineage import reports_of
from common.serving.live import Live
from common.serving.service import Service, pictures_of, without_paths

SECONDS_BETWEEN_LOOKS = 0.1  # at the jobs that run, while somebody listens
SECONDS_BETWEEN_PINGS = 15.0
SECONDS_UNTIL_WRITTEN = 1.0  # that a job's end may have been before the queue has it
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # proxies pass it on at once
MOST_ENDED = 200  # jobs whose end is kept for who reads slowly
ENDINGS = ("done", "failed", "cancelled", "forgotten")
Event = dict[str, Any]  # its name is `event`, the rest is its data


class JobEvents:
    """The last event of each job; looked for while somebody listens, once for all who do."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._last: dict[str, Event] = {}
        self._ended_to = 0.0  # when the last job ended that was seen
        self._changed = asyncio.Condition()
        self._one_looks = asyncio.Lock()
        self._listeners = 0
        self._looking: asyncio.Task[None] | None = None

    async def listen(self, name: str | None = None) -> AsyncIterator[str]:
        """The stream of a job until it has ended, or of all; until the server ends.

        Where streams are bounded it ends earlier: who listens asks again, as browsers do.

        Args:
            name: of the job's run directory; None: all that have not ended, and those to come.
        """
        self._listeners += 1
        if self._listeners == 1:
            self._ended_to = time.time()
        began, most = time.monotonic(), self._service.bounds.events_seconds
        try:
            await self._look()
            # What ended before is not told to who asks for all.
            sent = {} if name else {job: each for job, each in self._last.items() if ended(each)}
            yield ": how jobs go\n\n"
            if name is not None and name not in self._last:  # it has ended meanwhile
                yield in_words(await self._ending(name), None)
                return
            while True:
                if self._looking is None:
                    self._looking = asyncio.create_task(self._keep_looking())
                for job, last in list(self._last.items()):
                    if name in (None, job) and sent.get(job) != last:
                        yield in_words(last, sent.get(job))
                        sent[job] = last
                if name is not None and ended(sent[name]):
                    return
                if self._service.ends:
                    yield in_words({"event": "shutdown"}, None)
                    return
                if most is not None and time.monotonic() - began > most:
                    return
                if not await self._wait():
                    yield ": still here\n\n"
        finally:
            self._listeners -= 1

    async def _wait(self) -> bool:
        """Wait for a change. Returns whether there was one before it is time for a ping."""
        try:
            async with asyncio.timeout(SECONDS_BETWEEN_PINGS), self._changed:
                await self._changed.wait()
        except TimeoutError:
            return False
        return True

    async def _keep_looking(self) -> None:
        try:
            while self._listeners and not self._service.ends:
                before = dict(self._last)
                with suppress(UnfitEnvironmentError):  # it may pass
                    await self._look()
                if before != self._last:
                    await self._tell()
                await asyncio.sleep(SECONDS_BETWEEN_LOOKS)
        finally:
            self._looking = None  # with nothing awaited before: who comes now begins it anew
        if not self._listeners:
            self._last.clear()
        await self._tell()

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _look(self) -> None:
        async with self._one_looks:
            active = await self._service.unfinished()
            waiting = [job for job in active if job.began_at is None]
            waiting.sort(key=lambda job: (-job.priority, job.number))
            places = {job.number: place for place, job in enumerate(waiting, 1)}
            now = {}
            for job in active:
                name = job.run_dir.name
                if job.number in places:
                    now[name] = queued(job, places[job.number])
                else:
                    now[name] = progress(job, await self._service.live(job), self._last.get(name))
            # Some begin and end between two looks.
            for job in await self._service.ended_since(self._ended_to - SECONDS_UNTIL_WRITTEN):
                self._ended_to = max(self._ended_to, job.ended_at or 0.0)
                if job.run_dir.name not in self._last:
                    now[job.run_dir.name] = await ending(job)
            gone = [n for n, last in self._last.items() if n not in now and not ended(last)]
            for name in gone:
                now[name] = await self._ending(name)
            told = [name for name, last in self._last.items() if ended(last)]
            for name in told[:-MOST_ENDED]:
                del self._last[name]
            self._last.update(now)

    async def _ending(self, name: str) -> Event:
        job = await self._service.find(name)
        return {"event": "forgotten", "id": name} if job is None else await ending(job)

    async def of_ended(self, job: Job) -> AsyncIterator[str]:
        """The stream of a job that has ended."""
        yield in_words(await ending(job), None)


def queued(job: Job, place: int) -> Event:
    """A job that waits for its first stage; the next one's place is 1."""
    return {"event": "queued", "id": job.run_dir.name, "place": place}


def progress(job: Job, live: Live | None, last: Event | None) -> Event:
    """A job one of whose stages runs, or is the next to."""
    last = last if last is not None and last["event"] == "progress" else {}
    same = last.get("stage") == job.step.stage
    preview = live.preview if live is not None else None
    shown = None if preview is None else base64.b64encode(preview).decode()
    return {
        "event": "progress",
        "id": job.run_dir.name,
        "stage": job.step.stage,
        "step": live.done if live is not None else last["step"] if same else 0,
        "steps": live.total if live is not None else last["steps"] if same else None,
        "seconds_left": None if live is None else live.seconds_left,
        "preview": f"data:image/jpeg;base64,{shown}" if shown else last.get("preview"),
    }


async def ending(job: Job) -> Event:
    """How a job has ended."""
    name = job.run_dir.name
    if job.state is State.DONE:
        files, reports = await asyncio.to_thread(
            lambda: (pictures_of(job), reports_of(job.run_dir))
        )
        return {
            "event": "done",
            "id": name,
            "pictures": [f"/jobs/{name}/pictures/{number}" for number in range(len(files))],
            "seconds": {str(each["stage"]): each["wall_seconds"] for each in reports},
        }
    told = {"event": str(job.state), "id": name}
    return told if job.state is State.CANCELLED else told | {"error": without_paths(job.error)}


def ended(event: Event) -> bool:
    """Whether nothing comes after it."""
    return event["event"] in ENDINGS


def in_words(event: Event, before: Event | None) -> str:
    """An event as the stream has it; a preview only where it is another one than before."""
    data = {name: value for name, value in event.items() if name != "event"}
    if data.get("preview") in (None, (before or {}).get("preview")):
        data.pop("preview", None)
    return f"event: {event['event']}\ndata: {json.dumps(data)}\n\n"


def router_of(service: Service) -> APIRouter:
    """Its routes."""
    router, events = APIRouter(tags=["jobs"]), JobEvents(service)

    def stream(lines: AsyncIterator[str]) -> StreamingResponse:
        return StreamingResponse(lines, media_type="text/event-stream", headers=HEADERS)

    @router.get("/events")
    async def of_all() -> StreamingResponse:
        """How all jobs go: `queued`, `progress`, `done`, `failed`, `cancelled`, `shutdown`."""
        return stream(events.listen())

    @router.get("/jobs/{name}/events")
    async def of_one(name: str) -> StreamingResponse:
        """How a job goes, until it has ended."""
        found = await service.find(name)
        if found is None:
            raise HTTPException(404, f"there is no job {name[:40]!r}")
        return stream(events.of_ended(found) if found.has_ended else events.listen(name))

    return router
