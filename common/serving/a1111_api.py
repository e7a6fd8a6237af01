"""AUTOMATIC1111's API, /sdapi/v1, as the clients of its web UI speak it.

https://github.com/AUTOMATIC1111/stable-diffusion-webui/wiki/API; what it lists is what there is
here, and what is not supported is refused in a sentence.
"""

import asyncio
import base64
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from fastapi import APIRouter
from pydantic import BaseModel

from common.errors import BadSettingError, shorten
from common.files.stage_table import DENOISE
from common.runs.generation import RunSettings, read_run_settings
from common.serving.a1111_infotext import infotext_of, parse_infotext, told_of
from common.serving.a1111_names import SAMPLERS, SCHEDULES
from common.serving.a1111_requests import (
    MOST_NAMED,
    PictureRequest,
    TextRequest,
)
from common.serving.catalog import Catalog
from common.serving.jobs import Job
from common.serving.live import Live
from common.serving.request_pictures import decoded
from common.serving.service import Service

PREFIX = "/sdapi/v1"
# Kinds of things that the web UI has and that are not here; clients ask for their lists.
NONE_HERE = (
    *("hypernetworks", "face-restorers", "realesrgan-models", "prompt-styles", "sd-vae"),
    *("upscalers", "latent-upscale-modes"),
)
BEGUN = 0.01  # the progress of a job that has not come to its steps


class PngInfoRequest(BaseModel):
    """What `png-info` takes."""

    image: str


def router_of(service: Service, catalog: Catalog) -> APIRouter:
    """Its routes.

    Args:
        catalog: what requests may name.
    """
    router = APIRouter(prefix=PREFIX, tags=["AUTOMATIC1111"])
    settings = settings_of_every_run(service.flags)
    _add_pictures(router, service, catalog, settings)
    _add_progress(router, service)
    _add_lists(router, catalog, settings)
    _add_options(router, catalog, settings)
    return router


def _add_pictures(
    router: APIRouter, service: Service, catalog: Catalog, settings: RunSettings
) -> None:
    """What makes pictures, or reads them."""

    own_words = words_of(settings)

    def named_by(asked: TextRequest) -> dict[str, Any]:
        """What a request names, as flags."""
        words = catalog.embeddings_in([asked.text(), asked.negative_prompt], own_words)
        return catalog.flags(asked.override_settings.sd_model_checkpoint, asked.loras(), words)

    async def make(asked: TextRequest, pictures: Mapping[str, bytes]) -> dict[str, Any]:
        """Make a job of a request, wait for it, and tell its pictures."""
        model = asked.override_settings.sd_model_checkpoint
        named = await asyncio.to_thread(named_by, asked)
        if asked.override_settings.clip_stop == 1 and settings.clip_skip:
            raise BadSettingError("CLIP_stop_at_last_layers 1: this server leaves layers out")
        job = await service.submit(asked.flags() | named, pictures=pictures)
        files = await service.pictures_of(job)
        shown = files if asked.send_images else []
        return {
            "images": await asyncio.to_thread(_encoded, shown),
            "parameters": asked.told(),
            "info": await asyncio.to_thread(
                _info_of, job, files, asked, model or catalog.own_model
            ),
        }

    @router.post("/txt2img")
    async def txt2img(asked: TextRequest) -> dict[str, Any]:
        """Pictures of a prompt."""
        return await make(asked, {})

    @router.post("/img2img")
    async def img2img(asked: PictureRequest) -> dict[str, Any]:
        """Pictures that begin with a picture, or make a part of it anew."""
        asked.refuse_what_is_not_here()
        most = service.bounds.given_pixels
        return await make(asked, await asyncio.to_thread(asked.pictures, most))

    @router.post("/png-info")
    async def png_info(asked: PngInfoRequest) -> dict[str, Any]:
        """The settings in a picture's metadata."""
        text, items = await asyncio.to_thread(infotext_of, decoded(asked.image, "image"))
        return {"info": text, "items": items, "parameters": parse_infotext(text) if text else {}}


def _add_progress(router: APIRouter, service: Service) -> None:
    """What is told of the job that runs, and done to it."""

    @router.get("/progress")
    async def progress(skip_current_image: bool = False) -> dict[str, Any]:
        """How far the job is that runs."""
        jobs = await service.unfinished()
        job = _running(jobs)
        live = None if job is None else await service.live(job)
        return progress_of(jobs, job, live, with_picture=not skip_current_image)

    async def cancel() -> None:
        """Cancel the job that runs; its request is answered with an error."""
        job = _running(await service.unfinished())
        if job is not None:
            await service.cancel(job)

    @router.post("/interrupt")
    async def interrupt() -> dict[str, Any]:
        """Cancel the job that runs."""
        await cancel()
        return {}

    @router.post("/skip")
    async def skip() -> None:
        """The same: a job's pictures are made at once, so that none is skipped alone."""
        await cancel()


def _add_lists(router: APIRouter, catalog: Catalog, settings: RunSettings) -> None:
    """What there is."""

    @router.get("/samplers")
    async def samplers() -> list[dict[str, Any]]:
        """The samplers' names."""
        return [
            {"name": label, "aliases": [row.name], "options": {}} for label, row in SAMPLERS.items()
        ]

    @router.get("/schedulers")
    async def schedulers() -> list[dict[str, Any]]:
        """The schedulers' names."""
        further = {"aliases": None, "default_rho": -1.0, "need_inner_model": False}
        return [{"name": row.name, "label": row.label, **further} for row in SCHEDULES.values()]

    @router.get("/sd-models")
    async def sd_models() -> list[dict[str, Any]]:
        """The checkpoints."""
        unknown = dict.fromkeys(("hash", "sha256", "config"))
        return [
            {"title": name, "model_name": name, "filename": name, **unknown}
            for name in await asyncio.to_thread(catalog.models)
        ]

    @router.post("/refresh-checkpoints")
    async def refresh_checkpoints() -> None:
        """Nothing to do: folders are read anew for each request."""

    @router.post("/refresh-loras")
    async def refresh_loras() -> None:
        """Nothing to do: folders are read anew for each request."""

    @router.get("/loras")
    async def loras() -> list[dict[str, Any]]:
        """The LoRAs that prompts may call, `<lora:NAME:SCALE>`."""
        return [
            {"name": name, "alias": name, "path": name, "metadata": {}}
            for name in await asyncio.to_thread(catalog.loras)
        ]

    @router.get("/embeddings")
    async def embeddings() -> dict[str, Any]:
        """The textual inversions that prompts may name."""
        unknown = dict.fromkeys(("step", "sd_checkpoint", "sd_checkpoint_name", "shape", "vectors"))
        names = [*words_of(settings), *await asyncio.to_thread(catalog.embeddings)]
        return {"loaded": dict.fromkeys(names, unknown), "skipped": {}}

    @router.get("/scripts")
    async def scripts() -> dict[str, list[str]]:
        """There are none."""
        return {"txt2img": [], "img2img": []}

    async def none() -> list[Any]:
        """There are none."""
        return []

    for name in NONE_HERE:
        router.add_api_route(f"/{name}", none, methods=["GET"])


def _add_options(router: APIRouter, catalog: Catalog, settings: RunSettings) -> None:
    """What the server was started with."""
    options = {
        "sd_model_checkpoint": catalog.own_model,
        "CLIP_stop_at_last_layers": (settings.clip_skip or 0) + 1,
        "samples_format": settings.image_format,
    }

    @router.get("/options")
    async def get_options() -> dict[str, Any]:
        """The settings of every picture that requests may have others of."""
        return options

    @router.post("/options")
    async def set_options(asked: dict[str, Any]) -> None:
        """Nothing is set for other requests: what differs is refused."""
        for name, value in asked.items():
            if name not in options or value != options[name]:
                raise BadSettingError(
                    f"{shorten(name, MOST_NAMED)} cannot be set for all requests: give it in a "
                    "request's override_settings, or start the server with another"
                )

    @router.get("/cmd-flags")
    async def cmd_flags() -> dict[str, bool]:
        """The web UI's own flags that hold here."""
        return {"api": True, "nowebui": True}

    @router.get("/memory")
    async def memory() -> dict[str, Any]:
        """The machine's memory; that of devices is their processes'."""
        now = psutil.virtual_memory()
        ram = {"free": now.available, "used": now.total - now.available, "total": now.total}
        return {"ram": ram, "cuda": {"error": "unavailable"}}


def progress_of(
    jobs: Sequence[Job], job: Job | None, live: Live | None, *, with_picture: bool
) -> dict[str, Any]:
    """How far a job is, as the web UI tells it; without one nothing is to be done.

    Args:
        jobs: all that have not ended.
        job: the one that runs.
        live: what is known of it.
        with_picture: whether it is shown as it is now.
    """
    share = 0.0 if job is None else BEGUN
    if live is not None and live.total:
        share = max(share, min(1.0, live.done / live.total))
    has_steps = live is not None and live.stage == DENOISE.number
    began = "" if job is None else time.strftime("%Y%m%d%H%M%S", time.localtime(job.began_at))
    preview = live.preview if live is not None and with_picture else None
    return {
        "progress": share,
        "eta_relative": (live.seconds_left if live is not None else None) or 0.0,
        "state": {
            "skipped": False,
            "interrupted": job is not None and job.cancel_asked,
            "job": "" if job is None else job.run_dir.name,
            "job_count": len(jobs),
            "job_timestamp": began,
            "job_no": 0,
            "sampling_step": live.done if live is not None and has_steps else 0,
            "sampling_steps": live.total if live is not None and has_steps else 0,
        },
        "current_image": None if preview is None else base64.b64encode(preview).decode(),
        "textinfo": None if live is None else f"stage {live.stage}",
    }


def _running(jobs: Sequence[Job]) -> Job | None:
    """The first that has begun; between two stages it waits."""
    return next((job for job in jobs if job.began_at is not None), None)


def settings_of_every_run(flags: Mapping[str, Any]) -> RunSettings:
    """The settings that this API tells of, as all runs have them.

    Args:
        flags: of every run, as `run_all.sh` takes them.
    """
    names = {"clip_skip": "clip_skip", "image_format": "image_format", "embedding": "embeddings"}
    own = {names[flag]: value for flag, value in flags.items() if flag in names}
    return read_run_settings(flags.get("config"), own)


def words_of(settings: RunSettings) -> list[str]:
    """Those that every prompt may have."""
    return [each.token or Path(each.file).stem for each in settings.embeddings]


def _info_of(job: Job, files: Sequence[Path], asked: TextRequest, model: str) -> str:
    """An answer's `info`, which is JSON in a text."""
    told = {
        "prompt": asked.prompt,
        "negative_prompt": asked.negative_prompt,
        "sampler_name": asked.sampler,
        "cfg_scale": asked.cfg_scale,
        "steps": asked.steps,
        "sd_model_name": model,
        "sd_model_hash": None,
        "clip_skip": asked.override_settings.clip_stop,
        "denoising_strength": (
            asked.denoising_strength if isinstance(asked, PictureRequest) else None
        ),
        "job_timestamp": time.strftime("%Y%m%d%H%M%S", time.localtime(job.accepted_at)),
    }
    return json.dumps(told_of(job.run_dir, files, told))


def _encoded(files: Sequence[Path]) -> list[str]:
    return [base64.b64encode(path.read_bytes()).decode() for path in files]
