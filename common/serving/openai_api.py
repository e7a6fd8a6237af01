"""OpenAI's images API, as its clients speak it.

https://platform.openai.com/docs/api-reference/images; what is not supported is refused in a
sentence, not dropped. Fields of ours that it does not have (`seed`, `negative_prompt`, …) are taken
as well; its Python client sends them by `extra_body`.
"""

import asyncio
import base64
import hashlib
import re
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Request
from pydantic import BaseModel, ConfigDict, Field

from common.errors import BadInputFileError, BadSettingError, shorten
from common.serving.jobs import Job
from common.serving.service import Service, pictures_of, without_paths

MOST_NAMED = 60  # characters of what is refused
FORMATS = {"png": "png", "jpeg": "jpg", "webp": "webp"}  # its name → ours
SECONDS_OF_REQUESTS = 900  # in which a client's retry means the request before


class GenerationRequest(BaseModel):
    """What `images.generate` sends, and what of ours goes with it."""

    model_config = ConfigDict(extra="forbid")

    prompt: Annotated[str, Field(min_length=1, max_length=4000)]
    model: str | None = None
    n: Annotated[int, Field(ge=1, le=100)] | None = None
    size: str | None = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    # What has one value here, or none.
    quality: Literal["auto", "standard"] | None = None
    style: None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    stream: Literal[False] | None = None
    partial_images: Literal[0] | None = None
    output_compression: Literal[100] | None = None
    user: str | None = None
    # Ours.
    negative_prompt: Annotated[str, Field(max_length=4000)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    num_inference_steps: Annotated[int, Field(ge=1)] | None = None
    guidance_scale: Annotated[float, Field(ge=0)] | None = None
    scheduler: Annotated[str, Field(pattern=r"^[\w-]+$")] | None = None

    def flags(self, seed: int) -> dict[str, Any]:
        """As `run_all.sh` takes them.

        Args:
            seed: where none is asked for.
        """
        own = ("negative_prompt", "num_inference_steps", "guidance_scale", "scheduler")
        return {
            "prompt": [self.prompt],
            "num_images_per_prompt": self.n,
            "seed": seed if self.seed is None else self.seed,
            "image_format": None if self.output_format is None else FORMATS[self.output_format],
            **self._sides(),
            **{name: getattr(self, name) for name in own},
        }

    def _sides(self) -> dict[str, int]:
        if self.size in (None, "auto"):
            return {}
        match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", str(self.size))
        if match is None:
            raise BadSettingError(f"size {self.size!r}: give WIDTHxHEIGHT, as 1024x1024, or auto")
        return {"width": int(match[1]), "height": int(match[2])}


def router_of(service: Service, models: list[str]) -> APIRouter:
    """Its routes.

    Args:
        models: the names of checkpoints that a request may ask for.
    """
    router = APIRouter(prefix="/v1", tags=["OpenAI"])

    @router.get("/models")
    async def list_models() -> dict[str, Any]:
        """The checkpoints."""
        own = [
            {"id": name, "object": "model", "created": 0, "owned_by": "local"} for name in models
        ]
        return {"object": "list", "data": own}

    @router.post("/images/generations")
    async def generate(
        request: Request,
        asked: GenerationRequest,
        x_stainless_retry_count: Annotated[str | None, Header()] = None,
    ) -> dict[str, Any]:
        """Pictures of a prompt."""
        if asked.model not in (None, *models):
            name = shorten(asked.model or "", MOST_NAMED)
            raise BadSettingError(f"model {name!r} is not here: there is {', '.join(models)}")
        digest = hashlib.sha256(await request.body()).hexdigest()
        # Another request is another picture, unless it says its seed; a retry is the same one.
        is_retry = x_stainless_retry_count not in (None, "0")
        known = await service.last_of(digest, SECONDS_OF_REQUESTS) if is_retry else None
        job = known or await service.submit(
            asked.flags(seed=time.time_ns() % 2**32), key=f"{digest} {time.time_ns()}"
        )
        job = await service.wait_for(job)
        if job.exit_code != 0:
            raise JobFailedError(job)
        data = await asyncio.to_thread(_data_of, job, asked.response_format)
        return {"created": int(job.accepted_at), "data": data}

    return router


class JobFailedError(Exception):
    """A job ended without its pictures."""

    def __init__(self, job: Job) -> None:
        self.status = 400 if job.exit_code == 2 else 500
        super().__init__(without_paths(job.error) or "the job was cancelled")


def _data_of(job: Job, form: str | None) -> list[dict[str, str]]:
    """The pictures as the API has them; their addresses are paths on this server."""
    files = pictures_of(job)
    if not files:
        raise BadInputFileError(f"the pictures of job {job.run_dir.name} are gone: ask again")
    if form == "url":
        return [{"url": f"/jobs/{job.run_dir.name}/pictures/{k}"} for k in range(len(files))]
    return [{"b64_json": base64.b64encode(path.read_bytes()).decode()} for path in files]
