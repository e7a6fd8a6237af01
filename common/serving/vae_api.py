"""The VAE alone: `/decode` and `/encode` of Hugging Face's hybrid inference.

https://huggingface.co/docs/diffusers/hybrid_inference/overview; the client is diffusers'
`remote_utils`, whose parameters travel in the query and whose tensors are the body's bytes. Stages
0 and 3 with `--remote_vae` ask for some things that it does not know: `vae`, `vae_dtype`, `tile`,
`moments`.
"""

import asyncio
import io
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Query, Request, Response
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from common.declared import Dtype
from common.errors import BadSettingError, NotFiniteError, UnfitEnvironmentError
from common.files.picture_files import LOSSY_QUALITY
from common.serving.jobs import Job, State, Step
from common.serving.request_pictures import pixels_of
from common.serving.service import JobFailedError, Service, without_paths
from common.serving.vae_jobs import Answer, VaeRequest, read_answer, write_request
from common.vae.hybrid_format import (
    DECODE_PATH,
    DTYPE,
    ENCODE_PATH,
    SHAPE,
    VAE,
    VAE_DTYPE,
    WireDtype,
    read_array,
    write_array,
)

MEDIA_TYPES = {"png": "image/png", "jpg": "image/jpeg"}
TENSORS = "tensor/binary"
SECONDS_BETWEEN_LOOKS = 0.2  # for a client that has gone

Factor = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Shift = Annotated[float, Field(allow_inf_nan=False)]


class _VaeQuery(BaseModel):
    """What both take."""

    model_config = ConfigDict(extra="forbid")

    shape: list[int] = []
    dtype: WireDtype | None = None
    do_scaling: bool = False
    scaling_factor: Factor | None = None
    shift_factor: Shift | None = None
    # Ours.
    vae: str | None = None
    vae_dtype: Dtype | None = None
    tile: bool | None = None

    def asked(self) -> dict[str, Any]:
        """What of it goes to the VAE."""
        if self.do_scaling and self.scaling_factor is not None:
            raise BadSettingError("give either do_scaling or scaling_factor, not both")
        return self.model_dump(include={*VaeRequest.model_fields})


class DecodeQuery(_VaeQuery):
    """What `remote_decode` sends."""

    output_type: Literal["pil", "pt", "mp4"] = "pil"
    image_format: Literal["png", "jpg"] = "jpg"
    partial_postprocess: bool = False
    height: int | None = None
    width: int | None = None


class EncodeQuery(_VaeQuery):
    """What `remote_encode` sends."""

    moments: bool = False  # ours: the posterior's parameters in place of its mode


def router_of(service: Service) -> APIRouter:
    """Its routes."""
    router = APIRouter(tags=["VAE"])

    @router.post(DECODE_PATH)
    async def decode(request: Request, query: Annotated[DecodeQuery, Query()]) -> Response:
        """Latents to pictures."""
        # With a processor the client takes "pil" for floats in [0, 1], which it says thus alone.
        as_file = query.output_type == "pil" and TENSORS not in request.headers.get("accept", "")
        _refuse_undecodable(query, as_file)
        body = await request.body()
        latents = await asyncio.to_thread(_tensor, service, body, query)
        in_pixels = as_file or (query.output_type == "pt" and query.partial_postprocess)
        asked = VaeRequest(
            output="pixels" if in_pixels else "floats",
            most_pixels=service.bounds.pixels,
            **query.asked(),
        )
        answer = await _compute(service, request, asked, latents)
        if as_file:
            content = await asyncio.to_thread(_encoded, answer.array[0], query.image_format)
            return Response(content, media_type=MEDIA_TYPES[query.image_format])
        array = answer.array
        if query.output_type == "pil":
            array = (array / 2 + np.float32(0.5)).clip(0, 1)
        return _response(answer, array)

    @router.post(ENCODE_PATH)
    async def encode(request: Request, query: Annotated[EncodeQuery, Query()]) -> Response:
        """Pictures to latents: the posterior's mode."""
        is_scaled = query.do_scaling or query.scaling_factor or query.shift_factor is not None
        if query.moments and is_scaled:
            raise BadSettingError("moments are not scaled: leave them or the factors out")
        body = await request.body()
        read = _picture if query.dtype is None and not query.shape else _tensor
        pictures = await asyncio.to_thread(read, service, body, query)
        asked = VaeRequest(
            output="moments" if query.moments else "latents",
            most_pixels=service.bounds.pixels,
            **query.asked(),
        )
        answer = await _compute(service, request, asked, pictures)
        return _response(answer, answer.array)

    return router


def _refuse_undecodable(query: DecodeQuery, as_file: bool) -> None:
    """Raise `BadSettingError` for what is of other models, or cannot be sent."""
    if query.output_type == "mp4":
        raise BadSettingError("output_type mp4 is of videos: ask for pil or pt")
    if query.height is not None or query.width is not None or len(query.shape) == 3:
        raise BadSettingError(
            "height and width are of packed latents: send latents [B, C, h, w] without them"
        )
    if query.dtype == "uint8":
        raise BadSettingError("dtype uint8: latents are float32, float16 or bfloat16")
    if as_file and len(query.shape) == 4 and query.shape[0] > 1:
        raise BadSettingError(
            f"output_type pil without a processor is one picture, and these are {query.shape[0]}: "
            "ask for pt, or give a processor"
        )


def _tensor(service: Service, body: bytes, query: _VaeQuery) -> np.ndarray:
    """The tensor [B, C, h, w] of a body: uint8, or float32.

    Raises:
        BadSettingError: it is none, has values that are not finite, or is too much.
    """
    if query.dtype is None or len(query.shape) != 4:
        raise BadSettingError(
            f"give the dtype, and shape once for each of 4 dimensions: it has {len(query.shape)}"
        )
    found = read_array(body, query.shape, query.dtype)
    if query.shape[0] > service.bounds.images:
        raise BadSettingError(
            f"{query.shape[0]} images are more than the {service.bounds.images} that are allowed"
        )
    if found.dtype != np.uint8 and not np.isfinite(found).all():
        raise BadSettingError("the tensor has values that are not finite")
    return found


def _picture(service: Service, body: bytes, _: _VaeQuery) -> np.ndarray:
    """The picture [1, 3, H, W] uint8 of a body.

    Raises:
        BadSettingError: it is none, or too large.
    """
    pixels = pixels_of(body, "the body", service.bounds.pixels)
    return pixels.transpose(2, 0, 1)[None]


async def _compute(
    service: Service, request: Request, asked: VaeRequest, array: np.ndarray
) -> Answer:
    """Have a job done of which nothing is left; one whose client goes is cancelled.

    Raises:
        JobFailedError: it ended otherwise.
        HTTPException: the VAE gave what is not finite.
    """

    def prepare(run_dir: Path, flags: Mapping[str, Any]) -> Sequence[Step]:
        return write_request(asked, array, run_dir, flags)

    job = await service.submit_own(prepare)
    looking = asyncio.create_task(_cancel_when_gone(service, request, job))
    try:
        ended = await service.wait_for(job)
        if ended.exit_code == NotFiniteError.exit_code:
            raise HTTPException(422, without_paths(ended.error))
        if ended.state is not State.DONE:
            raise JobFailedError(ended)
        return await asyncio.to_thread(read_answer, job.run_dir)
    finally:
        looking.cancel()
        with suppress(UnfitEnvironmentError):
            await service.cancel(job)  # where the server ends before it
            await service.forget(job)


async def _cancel_when_gone(service: Service, request: Request, job: Job) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(SECONDS_BETWEEN_LOOKS)
    await service.cancel(job)


def _encoded(pixels: np.ndarray, image_format: str) -> bytes:
    """A picture's file."""
    file, image = io.BytesIO(), Image.fromarray(pixels)
    if image_format == "png":
        image.save(file, format="PNG")
    else:
        image.save(file, format="JPEG", quality=LOSSY_QUALITY, subsampling=0)
    return file.getvalue()


def _response(answer: Answer, array: np.ndarray) -> Response:
    content, dtype = write_array(array)
    headers = {
        SHAPE: json.dumps(array.shape),
        DTYPE: dtype,
        VAE: answer.vae,
        VAE_DTYPE: answer.vae_dtype,
    }
    return Response(content, headers=headers, media_type=TENSORS)
