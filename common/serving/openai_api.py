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
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Request
from fastapi.exceptions import RequestValidationError
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from common.errors import BadSettingError
from common.serving.catalog import Catalog, Embeddings, Loras
from common.serving.multipart_forms import digest_of, read_form
from common.serving.request_pictures import to_edit
from common.serving.service import Service

FORMATS = {"png": "png", "jpeg": "jpg", "webp": "webp"}  # its name → ours
SECONDS_OF_REQUESTS = 900  # in which a client's retry means the request before
FILES = ("image", "mask")  # of edits
RetryCount = Annotated[str | None, Header(alias="x-stainless-retry-count")]
# Forms have texts alone.
No = Annotated[Literal[False], BeforeValidator(lambda value: False if value == "false" else value)]


class PicturesRequest(BaseModel):
    """What requests for pictures have, OpenAI's fields and ours."""

    model_config = ConfigDict(extra="forbid")

    prompt: Annotated[str, Field(min_length=1, max_length=4000)]
    model: str | None = None
    n: Annotated[int, Field(ge=1, le=100)] | None = None
    size: str | None = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    # What has one value here, or none.
    quality: Literal["auto", "standard"] | None = None
    background: Literal["auto", "opaque"] | None = None
    stream: No | None = None
    partial_images: Annotated[int, Field(ge=0, le=0)] | None = None
    output_compression: Annotated[int, Field(ge=100, le=100)] | None = None
    user: str | None = None
    # Ours.
    negative_prompt: Annotated[str, Field(max_length=4000)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    num_inference_steps: Annotated[int, Field(ge=1)] | None = None
    guidance_scale: Annotated[float, Field(ge=0)] | None = None
    scheduler: Annotated[str, Field(pattern=r"^[\w-]+$")] | None = None
    loras: Loras = {}
    embeddings: Embeddings = []

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


class GenerationRequest(PicturesRequest):
    """What `images.generate` sends."""

    style: None = None
    moderation: Literal["auto", "low"] | None = None


class EditRequest(PicturesRequest):
    """What `images.edit` sends besides its files."""

    input_fidelity: Literal["low"] | None = None
    # Ours.
    strength: Annotated[float, Field(ge=0, le=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _empty_is_none(cls, values: dict[str, str]) -> dict[str, str]:
        """As clients write null in a form; a text may be empty."""
        texts = ("prompt", "negative_prompt")
        return {name: value for name, value in values.items() if value or name in texts}

    def flags(self, seed: int) -> dict[str, Any]:
        """As `run_all.sh` takes them."""
        return {**super().flags(seed), "strength": self.strength}


def router_of(service: Service, catalog: Catalog) -> APIRouter:
    """Its routes.

    Args:
        catalog: what requests may name.
    """
    router = APIRouter(prefix="/v1", tags=["OpenAI"])

    async def answer(
        asked: PicturesRequest,
        digest: str,
        retry: str | None,
        pictures: Mapping[str, bytes] | None = None,
    ) -> dict[str, Any]:
        """Make a job of a request, wait for it, and tell its pictures."""
        # Another request is another picture, unless it says its seed; a retry is the same one.
        is_retry = retry not in (None, "0")
        job = await service.last_of(digest, SECONDS_OF_REQUESTS) if is_retry else None
        if job is None:
            flags = asked.flags(seed=time.time_ns() % 2**32)
            named = (asked.model, asked.loras, asked.embeddings)
            flags |= await asyncio.to_thread(catalog.flags, *named)
            if pictures and "mask_image" in pictures:
                flags["keep_unmasked"] = True
            job = await service.submit(flags, pictures=pictures, key=f"{digest} {time.time_ns()}")
        files = await service.pictures_of(job)
        data = await asyncio.to_thread(_data_of, files, asked.response_format, job.run_dir.name)
        return {"created": int(job.accepted_at), "data": data}

    @router.get("/models")
    async def list_models() -> dict[str, Any]:
        """The checkpoints."""
        facts = {"object": "model", "created": 0, "owned_by": "local"}
        names = await asyncio.to_thread(catalog.models)
        return {"object": "list", "data": [{"id": name, **facts} for name in names]}

    @router.post("/images/generations")
    async def generate(
        request: Request, asked: GenerationRequest, retry: RetryCount = None
    ) -> dict[str, Any]:
        """Pictures of a prompt."""
        return await answer(asked, hashlib.sha256(await request.body()).hexdigest(), retry)

    @router.post("/images/edits", openapi_extra={"requestBody": _body_of_edits()})
    async def edit(request: Request, retry: RetryCount = None) -> dict[str, Any]:
        """Pictures of a prompt that begin with a picture, or make its transparent part anew."""
        fields, files = await read_form(request, FILES)
        try:
            asked = EditRequest.model_validate(fields)
        except ValidationError as error:
            raise RequestValidationError(error.errors()) from None
        if "image" not in files:
            raise BadSettingError("image: send the picture to edit, as a file")
        most = service.bounds.given_pixels
        pictures = await asyncio.to_thread(to_edit, files["image"], files.get("mask"), most)
        return await answer(asked, digest_of(fields, files), retry, pictures)

    return router


def _body_of_edits() -> dict[str, Any]:
    """What the schema says of an edit's body."""
    schema = EditRequest.model_json_schema()
    for name in FILES:
        schema["properties"][name] = {"type": "string", "format": "binary"}
    schema["required"].append("image")
    return {"required": True, "content": {"multipart/form-data": {"schema": schema}}}


def _data_of(files: list[Path], form: str | None, job: str) -> list[dict[str, str]]:
    """The pictures as the API has them; their addresses are paths on this server."""
    if form == "url":
        return [{"url": f"/jobs/{job}/pictures/{k}"} for k in range(len(files))]
    return [{"b64_json": base64.b64encode(path.read_bytes()).decode()} for path in files]
