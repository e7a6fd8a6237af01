"""Jobs by JSON, with the project's own names of settings: what the page asks for."""

import asyncio
import io
import json
import secrets
from typing import Annotated, Any

from fastapi import APIRouter, Header
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from common.declared import declarations
from common.errors import BadSettingError
from common.files.input_pictures import UNREADABLE
from common.files.picture_files import read_texts
from common.runs.generation import RunSettings, read_run_settings
from common.sampling.schedulers import SCHEDULERS
from common.serving.a1111_infotext import parse_infotext
from common.serving.catalog import Catalog, Embeddings, Loras
from common.serving.jobs import Job
from common.serving.request_pictures import decoded
from common.serving.service import Service

# The settings that a request may have; the others are the server's, by its flags.
ALLOWED = (
    *("seed", "num_inference_steps", "guidance_scale", "scheduler", "height", "width"),
    *("num_images_per_prompt", "strength", "image_format", "guidance_rescale", "eta", "clip_skip"),
)
OF_CLIENTS = "of a client: "  # before keys of clients, so that they are no other ones
MOST_KEY = 200  # characters
MOST_SEED = 2**32  # of one that is drawn here: JavaScript's numbers have 53 bits

Text = Annotated[str, Field(max_length=4000)]


class JobRequest(BaseModel):
    """A job that is asked for."""

    model_config = ConfigDict(extra="forbid")

    prompt: Annotated[str, Field(min_length=1, max_length=4000)]
    negative_prompt: Text | None = None
    model: Text | None = None
    loras: Loras = {}
    embeddings: Embeddings = []
    settings: dict[str, Any] = {}
    image: str | None = None  # base64, or a data URL
    mask_image: str | None = None

    def flags(self) -> dict[str, Any]:
        """As `run_all.sh` takes them, checked."""
        given = {name: value for name, value in self.settings.items() if value is not None}
        for name in given.keys() - {*ALLOWED}:
            raise BadSettingError(f"settings.{name[:40]}: a request may have {', '.join(ALLOWED)}")
        given.setdefault("seed", secrets.randbelow(MOST_SEED))
        given = checked(given)
        own = {} if self.negative_prompt is None else {"negative_prompt": self.negative_prompt}
        return {"prompt": [self.prompt], **own, **given}

    def pictures(self) -> dict[str, bytes]:
        """Those that came with it."""
        given = {"image": self.image, "mask_image": self.mask_image}
        return {flag: decoded(text, flag) for flag, text in given.items() if text is not None}


class PictureRequest(BaseModel):
    """A picture to read settings from."""

    model_config = ConfigDict(extra="forbid")

    image: str


def checked(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as they are declared."""
    values = read_run_settings(None, settings)
    return {name: getattr(values, name) for name in settings}


def router_of(service: Service, catalog: Catalog) -> APIRouter:
    """Its routes.

    Args:
        catalog: what requests may name.
    """
    router = APIRouter(tags=["jobs"])

    @router.post("/jobs", status_code=202)
    async def submit(
        asked: JobRequest,
        idempotency_key: Annotated[str | None, Header(max_length=MOST_KEY)] = None,
    ) -> dict[str, Any]:
        """Accept a job; its events tell how it goes. The same key makes no second job."""
        named = (asked.model, asked.loras, asked.embeddings)
        flags = asked.flags() | await asyncio.to_thread(catalog.flags, *named)
        key = None if idempotency_key is None else f"{OF_CLIENTS}{idempotency_key}"
        job = await service.submit(flags, pictures=asked.pictures(), key=key)
        return {"id": job.run_dir.name, "state": job.state, "seed": _seed_of(job)}

    def names() -> dict[str, list[str]]:
        return {
            "models": catalog.models(),
            "loras": catalog.loras(),
            "embeddings": catalog.embeddings(),
        }

    @router.get("/options")
    async def options() -> dict[str, Any]:
        """What a request may have: names, schedulers, defaults, bounds."""
        defaults = service.defaults()
        bounds = service.bounds
        return {
            **await asyncio.to_thread(names),
            "schedulers": {row.name: row.web_ui for row in SCHEDULERS.values()},
            "defaults": {name: defaults[name] for name in (*ALLOWED, "negative_prompt")},
            "bounds": {"pixels": bounds.pixels, "steps": bounds.steps, "images": bounds.images},
        }

    @router.post("/settings")
    async def settings(asked: PictureRequest) -> dict[str, Any]:
        """The settings that a picture's metadata hold, as `POST /jobs` takes them."""
        return settings_in(decoded(asked.image, "image"))

    return router


def _seed_of(job: Job) -> int:
    """That of a job, which may be of an earlier request with the same key."""
    (seed,) = (flag for flag in job.steps[0].arguments if flag.startswith("--seed="))
    return int(seed.removeprefix("--seed="))


def settings_in(picture: bytes) -> dict[str, Any]:
    """What a picture says of how it was made: our record, else the text of web UIs.

    Raises:
        BadSettingError: it is no picture, or says nothing.
    """
    try:
        with Image.open(io.BytesIO(picture), formats=("PNG", "JPEG", "WEBP")) as image:
            record, parameters = read_texts(image)
    except UNREADABLE:
        raise BadSettingError("image is no PNG, JPEG or WebP, or is damaged") from None
    found = _of_record(record) or _of_web_uis(parameters)
    if not found:
        raise BadSettingError("image has no settings in its metadata: choose another one")
    settings = checked({name: found[name] for name in ALLOWED if found.get(name) is not None})
    prompts = {name: found.get(name) for name in ("prompt", "negative_prompt")}
    return {**prompts, "settings": settings}


def _of_record(text: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
        settings = dict(record["settings"])
        flags = dict(record["flags"])
    except (ValueError, KeyError, TypeError):
        return {}
    short = flags.get("scheduler")  # the record has diffusers' class, which several names have
    return settings | {"num_images_per_prompt": None, "scheduler": short}


def _of_web_uis(text: str) -> dict[str, Any]:
    """The settings of ours in such a text."""
    said = parse_infotext(text)
    if "Steps" not in said:
        return {}
    names = {each.web_ui: name for name, each in declarations(RunSettings) if each.web_ui}
    found: dict[str, Any] = {"prompt": said["Prompt"]}
    found["negative_prompt"] = said["Negative prompt"] or None
    found |= {names[name]: value for name, value in said.items() if name in names}
    samplers = {row.web_ui: row.name for row in SCHEDULERS.values()}
    found["scheduler"] = samplers.get(said.get("Sampler", ""))
    return found | {"width": said.get("Size-1"), "height": said.get("Size-2")}
