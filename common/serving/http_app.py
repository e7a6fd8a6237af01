"""The HTTP server's application: its routes, and what of an error is told."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from common.errors import StageError
from common.serving import a1111_api, events, job_api, openai_api, page, vae_api
from common.serving.catalog import Catalog
from common.serving.guard import Guard, failure
from common.serving.job_queue import QueueFullError
from common.serving.jobs import Job, State
from common.serving.lineage import lineage_of
from common.serving.service import (
    JobFailedError,
    Service,
    ShuttingDownError,
    pictures_of,
    without_paths,
)


def make_app(
    service: Service, catalog: Catalog, api_key: str | None, is_ready: Callable[[], bool]
) -> FastAPI:
    """The application.

    Args:
        catalog: what requests may name.
        api_key: that requests must have; None: no key.
        is_ready: whether all stages are open.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(each()) for each in (service.watch, service.forget_old)]
        yield
        service.ends = True
        await asyncio.gather(*tasks)

    # Its own pages of the API load scripts from elsewhere; /openapi.json is the same.
    app = FastAPI(
        title="Stable Diffusion in stages",
        version="1",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.include_router(vae_api.router_of(service))
    app.include_router(openai_api.router_of(service, catalog))
    app.include_router(a1111_api.router_of(service, catalog))
    app.include_router(_router_of_health(service, is_ready))
    app.include_router(_router_of_jobs(service))
    app.include_router(job_api.router_of(service, catalog))
    app.include_router(events.router_of(service))
    app.include_router(page.router_of())
    _say_errors(app)
    app.add_middleware(Guard, bounds=service.bounds, api_key=api_key)
    return app


def _router_of_health(service: Service, is_ready: Callable[[], bool]) -> APIRouter:
    router = APIRouter(tags=["health"])

    @router.get("/healthz")
    async def health() -> dict[str, bool]:
        """Whether the server lives."""
        return {"ok": True}

    @router.get("/readyz")
    async def ready() -> Response:
        """Whether all stages are open."""
        now = is_ready()
        return JSONResponse({"ready": now}, status_code=200 if now else 503)

    @router.get("/metrics")
    async def metrics() -> Response:
        """For Prometheus: the queue, what has ended, seconds of stages, compilations, memory."""
        return Response(await service.metrics(), media_type=CONTENT_TYPE_LATEST)

    return router


def _router_of_jobs(service: Service) -> APIRouter:
    router = APIRouter(prefix="/jobs", tags=["jobs"])

    async def find(name: str) -> Job:
        found = await service.find(name)
        if found is None:
            raise HTTPException(404, f"there is no job {name[:40]!r}")
        return found

    @router.get("")
    async def jobs() -> list[dict[str, Any]]:
        """The jobs, the last ones first."""
        return [told(job) for job in await service.jobs()]

    @router.get("/{name}")
    async def job(name: str) -> dict[str, Any]:
        """A job: where its pictures are, its settings, where its time went, its files."""
        found = await find(name)
        files = pictures_of(found) if found.state is State.DONE else []
        paths = [f"/jobs/{name}/pictures/{number}" for number in range(len(files))]
        return told(found) | {"pictures": paths, **await asyncio.to_thread(lineage_of, found)}

    @router.delete("/{name}")
    async def cancel(name: str) -> dict[str, Any]:
        """Cancel a job; one that runs ends when its stage has kept what it has.

        One that has ended is forgotten, with its run directory.
        """
        found = await find(name)
        if found.has_ended:
            await service.forget(found)
            return told(found)
        await service.cancel(found)
        return told(await find(name))

    @router.get("/{name}/pictures/{number}")
    async def picture(name: str, number: int) -> Response:
        """A picture of a job that is done."""
        found = await find(name)
        files = pictures_of(found) if found.state is State.DONE else []
        if not 0 <= number < len(files):
            raise HTTPException(404, f"job {name} has no picture {number}")
        return FileResponse(files[number])

    return router


def told(job: Job) -> dict[str, Any]:
    """What is told of a job."""
    running = None if job.has_ended else job.step.stage
    return {
        "id": job.run_dir.name,
        "state": job.state,
        "stage": running,
        "accepted_at": job.accepted_at,
        "began_at": job.began_at,
        "ended_at": job.ended_at,
        "error": without_paths(job.error) or None,
    }


def _say_errors(app: FastAPI) -> None:
    """Errors in the form of the API that was asked, a sentence each."""

    @app.exception_handler(StageError)
    async def of_ours(request: Request, error: StageError) -> Response:
        status = 400 if error.exit_code == 2 else 500
        if isinstance(error, QueueFullError | ShuttingDownError):
            status = 429 if isinstance(error, QueueFullError) else 503
        return failure(status, without_paths(str(error)), request.url.path)

    @app.exception_handler(JobFailedError)
    async def of_jobs(request: Request, error: JobFailedError) -> Response:
        return failure(error.status, str(error), request.url.path)

    @app.exception_handler(RequestValidationError)
    async def of_requests(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"] if part != "body")
        said = f"{name}: {first['msg']}" if name else str(first["msg"])
        return failure(400, said, request.url.path)

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> Response:
        return failure(error.status_code, str(error.detail), request.url.path)

    @app.exception_handler(Exception)
    async def of_the_program(request: Request, error: Exception) -> Response:
        said = f"a defect of this program: {type(error).__name__}"
        return failure(500, said, request.url.path)
