"""Jobs by JSON: what is taken, what is refused, what pictures say of their settings."""

import base64
import io
import struct
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image, PngImagePlugin

from common.errors import BadSettingError
from common.serving.job_api import JobRequest, settings_in
from common.serving.request_pictures import decoded
from tests.conftest import Run
from tests.refusals import refusal
from tests.serving.conftest import Server


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model_id": "x"}, "settings.model_id: a request may have seed, "),
        ({"init_latents": "/etc"}, "settings.init_latents"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"guidance_scale": "much"}, "guidance_scale"),
        ({"scheduler": "eular"}, "scheduler"),
        ({"strength": 2}, "strength"),
    ],
    ids=str,
)
def test_what_is_refused(settings: dict[str, Any], said: str) -> None:
    with refusal(BadSettingError, said):
        JobRequest(prompt="a", settings=settings).flags()


def test_pictures_come_inline() -> None:
    data = base64.b64encode(b"bytes").decode()
    for text in (data, f"data:image/png;base64,{data}"):
        assert decoded(text, "image") == b"bytes"
    for text in ("http://x/y,z", "data:image/png,ab", "?", "/etc/passwd,"):
        with refusal(BadSettingError, "image: "):
            decoded(text, "image")


def encoded(*, suffix: str, run_all: Run, folder: Path) -> bytes:
    flags = (
        "--prompt",
        "a ring",
        "--negative_prompt",
        "grey, dull",
        "--scheduler",
        "dpmpp_2m_karras",
    )
    sizes = ("--seed", 7, "--guidance_scale", 3.5, "--height", 64, "--width", 72)
    how = ("--num_inference_steps", 2, "--image_format", suffix, "--output_dir", folder)
    assert run_all(*flags, *sizes, *how).returncode == 0
    return (folder / f"output_image.{suffix}").read_bytes()


@pytest.mark.slow
def test_our_own_pictures_tell_their_settings(run_all: Run, tmp_path: Path) -> None:
    for suffix in ("png", "webp", "jpg"):
        found = settings_in(encoded(suffix=suffix, run_all=run_all, folder=tmp_path / suffix))
        assert (found["prompt"], found["negative_prompt"]) == ("a ring", "grey, dull")
        expected = {"seed": 7, "guidance_scale": 3.5, "num_inference_steps": 2}
        expected |= {"height": 64, "width": 72}
        assert expected.items() <= found["settings"].items()
        assert found["settings"]["scheduler"] == "dpmpp_2m_karras"
        JobRequest(**found).flags()  # as the API takes them


def of_web_uis(text: str) -> bytes:
    chunks, file = PngImagePlugin.PngInfo(), io.BytesIO()
    chunks.add_text("parameters", text)
    Image.new("RGB", (8, 8)).save(file, "PNG", pnginfo=chunks)
    return file.getvalue()


def test_pictures_of_web_uis_tell_theirs() -> None:
    found = settings_in(
        of_web_uis(
            "a ring,\non a table\nNegative prompt: grey\nSteps: 20, Sampler: DPM++ 2M Karras, "
            "CFG scale: 7, Seed: 11, Size: 512x768, Model hash: 1234, Denoising strength: 0.5"
        )
    )
    assert (found["prompt"], found["negative_prompt"]) == ("a ring,\non a table", "grey")
    assert JobRequest(**found).flags() == {
        **{"prompt": ["a ring,\non a table"], "negative_prompt": "grey", "seed": 11},
        **{"num_inference_steps": 20, "scheduler": "dpmpp_2m_karras", "guidance_scale": 7},
        **{"width": 512, "height": 768, "strength": 0.5},
    }
    with refusal(BadSettingError, "no settings in its metadata"):
        settings_in(of_web_uis("a ring"))
    with refusal(BadSettingError, "no PNG, JPEG or WebP"):
        settings_in(b"GIF89a")


def a_jpeg(exif: bytes) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (8, 8)).save(data, "JPEG", exif=exif)
    return data.getvalue()


def with_maker_note(kind: int, count: int, value: bytes) -> bytes:
    """EXIF with one tag in its folder: a MakerNote."""
    head = b"Exif\0\0II*\0\x08\0\0\0"
    folder = struct.pack("<HHHIII", 1, 0x8769, 4, 1, 26, 0)
    note = struct.pack("<HHHI", 1, 0x927C, kind, count) + value + bytes(4)
    return head + folder + note


@pytest.mark.parametrize(
    "exif",
    [
        with_maker_note(4, 1, b"\xff\xff\xff\xff"),  # a number: as many bytes, if one asks so
        with_maker_note(7, 4, b"\xff\xfe\xfd\xfc"),  # bytes of a camera
        with_maker_note(2, 4, b"abc\0"),
        b"Exif\0\0II*\0",  # it ends there
    ],
    ids=["number", "camera", "text", "cut"],
)
def test_metadata_of_others_are_no_settings(exif: bytes) -> None:
    with refusal(BadSettingError, "image "):
        settings_in(a_jpeg(exif))


@pytest.mark.slow
def test_jobs_of_a_server(server: Server) -> None:
    options = httpx.get(f"{server.url}/options").json()
    assert options["defaults"]["num_inference_steps"] == 2 and options["models"] == ["models/demo"]
    assert options["schedulers"]["euler"] == "Euler"
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(picture, "PNG")
    data = f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"
    body = {"prompt": "a", "image": data, "settings": {"strength": 0.5}}
    answer = httpx.post(f"{server.url}/jobs", json=body, timeout=60)
    assert answer.status_code == 202 and 0 <= answer.json()["seed"] < 2**32
    job = answer.json()["id"]
    assert (server.jobs_dir / "runs" / job / "given" / "image").read_bytes() == picture.getvalue()
    httpx.delete(f"{server.url}/jobs/{job}")
    for wrong in ({"prompt": ""}, {"prompt": "a", "colour": 1}, {"prompt": "a", "image": "?"}):
        answer = httpx.post(f"{server.url}/jobs", json=wrong)
        assert answer.status_code == 400 and answer.json()["error"]["message"]


@pytest.mark.slow
def test_pages_of_other_sites_can_ask_for_nothing(server: Server) -> None:
    own = {"origin": server.url, "sec-fetch-site": "same-origin"}
    assert httpx.post(f"{server.url}/settings", json={"image": "?"}, headers=own).status_code == 400
    others = (
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"sec-fetch-site": "cross-site"},
    )
    for headers in others:
        for method, path in (("POST", "/jobs"), ("DELETE", "/jobs/x"), ("POST", "/settings")):
            answer = httpx.request(method, f"{server.url}{path}", headers=headers)
            assert answer.status_code == 403 and "another site" in answer.text


@pytest.mark.slow
def test_the_same_key_is_the_same_job(server: Server) -> None:
    key = {"Idempotency-Key": "one"}
    answers = [
        httpx.post(f"{server.url}/jobs", json={"prompt": "a ring"}, headers=key) for _ in range(2)
    ]
    assert [answer.status_code for answer in answers] == [202, 202]
    first, second = (answer.json() for answer in answers)
    assert (first["id"], first["seed"]) == (second["id"], second["seed"])
