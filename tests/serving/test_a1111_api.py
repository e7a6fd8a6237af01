"""The web UI's own client against the server."""

import base64
import io
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image
from webuiapi import WebUIApi

from common.files.picture_files import read_pixels
from common.serving.a1111_api import progress_of, router_of
from common.serving.catalog import Catalog
from common.serving.job_queue import JobQueue
from common.serving.jobs import State
from common.serving.live import Live
from common.serving.service import Service
from tests.conftest import Run
from tests.serving.conftest import Server
from tests.serving.test_job_queue import STEPS
from tests.serving.test_openai_api import ANEW, PICTURE, png

SMALL = {"width": 64, "height": 64, "steps": 4}


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Any]:
    found = WebUIApi(baseurl=f"{server.url}/sdapi/v1", sampler="Euler")
    yield found
    found.session.close()


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB"))


def by_scripts(quick_stage: Run, run_dir: Path, *flags: str) -> list[np.ndarray]:
    """The pictures of a run of scripts."""
    folder = ("--output_dir", run_dir)
    first = quick_stage(1, *folder, "--height=64", "--width=64", "--num_inference_steps=4", *flags)
    assert first.returncode == 0, first.stderr
    numbers = (0, 2, 3) if any(flag.startswith("--image=") for flag in flags) else (2, 3)
    for number in numbers:
        assert quick_stage(number, *folder, "--mesh=single").returncode == 0
    return [read_pixels(path) for path in sorted(run_dir.glob("output_image*.png"))]


@pytest.mark.slow
def test_pictures_of_a_prompt_are_those_of_the_scripts(
    client: Any, tmp_path: Path, quick_stage: Run
) -> None:
    found = client.txt2img(
        prompt="a (red:1.3) star",
        negative_prompt="dark",
        seed=7,
        sampler_name="DPM++ 2M",
        scheduler="Karras",
        batch_size=1,
        n_iter=2,
        cfg_scale=5,
        override_settings={"CLIP_stop_at_last_layers": 2},
        **SMALL,
    )
    expected = by_scripts(
        quick_stage,
        tmp_path / "run",
        *("--prompt=a (red:1.3) star", "--negative_prompt=dark", "--seed=7", "--clip_skip=1"),
        *("--scheduler=dpmpp_2m_karras", "--guidance_scale=5", "--num_images_per_prompt=2"),
        *("--prompt_weighting=a1111", "--long_prompts=chunk"),
    )
    assert len(expected) == 2 and not np.array_equal(*map(np.ravel, expected))
    assert np.array_equal([pixels(each) for each in found.images], expected)
    assert found.info["all_seeds"] == [7, 8] and found.parameters["cfg_scale"] == 5
    for image, seed, text in zip(found.images, (7, 8), found.info["infotexts"], strict=True):
        read = client.png_info(image)
        assert read.info == text and f"Seed: {seed}," in text
        told = read.json["parameters"]
        assert (told["Prompt"], told["Sampler"]) == ("a (red:1.3) star", "DPM++ 2M Karras")
        assert (told["Steps"], told["Size-1"], told["Negative prompt"]) == ("4", "64", "dark")


@pytest.mark.slow
def test_what_is_white_in_a_mask_is_made_anew_as_by_the_scripts(
    client: Any, tmp_path: Path, quick_stage: Run
) -> None:
    found = client.img2img(
        images=[Image.fromarray(PICTURE)],
        mask_image=Image.fromarray(ANEW),
        mask_blur=0,
        inpainting_fill=1,
        inpaint_full_res_padding=4,
        denoising_strength=0.9,
        prompt="a red star",
        seed=3,
        **SMALL,
    )
    for name, data in (("image", png(PICTURE)), ("mask", png(ANEW))):
        (tmp_path / f"{name}.png").write_bytes(data)
    (expected,) = by_scripts(
        quick_stage,
        tmp_path / "run",
        *("--prompt=a red star", "--negative_prompt=", "--seed=3", "--scheduler=euler"),
        *("--guidance_scale=7", "--strength=0.9", "--padding_mask_crop=4", "--keep_unmasked"),
        *(f"--image={tmp_path / 'image.png'}", f"--mask_image={tmp_path / 'mask.png'}"),
        *("--prompt_weighting=a1111", "--long_prompts=chunk"),
    )
    ours = pixels(found.image)
    assert np.array_equal(ours, expected)
    assert np.array_equal(ours[ANEW == 0], PICTURE[ANEW == 0])
    assert (ours[ANEW > 0] != PICTURE[ANEW > 0]).any(1).mean() > 0.9


@pytest.mark.slow
def test_a_picture_to_begin_with_is_that_of_the_other_api(client: Any, server: Server) -> None:
    """Which is compared with the scripts; without weights a prompt is read alike."""
    found = client.img2img(
        images=[Image.fromarray(PICTURE)],
        denoising_strength=0.6,
        prompt="a red star",
        negative_prompt="dark",
        seed=3,
        **SMALL,
    )
    form = {"prompt": "a red star", "negative_prompt": "dark", "seed": "3", "strength": "0.6"}
    form |= {"guidance_scale": "7", "num_inference_steps": "4", "scheduler": "euler"}
    url, files = f"{server.url}/v1/images/edits", {"image": png(PICTURE)}
    (other,) = httpx.post(url, data=form, files=files, timeout=60).json()["data"]
    with Image.open(io.BytesIO(base64.b64decode(other["b64_json"]))) as expected:
        assert np.array_equal(pixels(found.image), pixels(expected))
    assert found.info["denoising_strength"] == 0.6 and found.parameters["init_images"] is None


@pytest.mark.slow
def test_defaults_of_the_client_are_taken(client: Any) -> None:
    """For inpainting a blurred mask, its colours filled in, and the crop of what it masks."""
    images, mask = [Image.fromarray(PICTURE)], Image.fromarray(ANEW)
    found = client.img2img(images=images, mask_image=mask, prompt="a", **SMALL)
    kept = ANEW == 0
    assert np.array_equal(pixels(found.image)[:4], PICTURE[:4]) and kept[:4].all()
    assert found.info["seed"] >= 0
    assert client.txt2img(prompt="", send_images=False, **SMALL).images == []


@pytest.mark.slow
def test_what_there_is(client: Any) -> None:
    assert "DPM++ 2M" in client.util_get_sampler_names()
    assert "karras" in client.util_get_scheduler_names()
    assert client.util_get_model_names() == ["models/demo"]
    assert client.util_get_current_model() == "models/demo"
    client.util_set_model("demo")
    client.refresh_checkpoints()
    client.util_wait_for_ready(0.1)
    options = client.get_options()
    assert options["CLIP_stop_at_last_layers"] == 1 and client.set_options(options) is None
    refused = client.set_options({"sd_model_checkpoint": "other"})
    assert "sd_model_checkpoint cannot be set for all requests" in refused["detail"]
    assert client.get_loras() == client.get_upscalers() == client.get_prompt_styles() == []
    assert client.get_embeddings() == {"loaded": {}, "skipped": {}}
    assert client.get_scripts() == {"txt2img": [], "img2img": []}
    memory = client.get_memory()["ram"]
    assert memory["free"] + memory["used"] == memory["total"] > 2**30
    assert client.get_cmd_flags()["api"] is True


@pytest.mark.slow
@pytest.mark.parametrize("how", ["interrupt", "skip"])
def test_a_job_that_is_interrupted_is_answered_with_an_error(
    client: Any, server: Server, how: str
) -> None:
    failed: list[RuntimeError] = []

    def ask() -> None:
        other = WebUIApi(baseurl=f"{server.url}/sdapi/v1")
        try:
            other.txt2img(prompt="long", batch_size=10, width=128, height=128, steps=150)
        except RuntimeError as error:
            failed.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    until = time.monotonic() + 60
    while not (now := client.get_progress())["state"]["job"]:
        assert time.monotonic() < until
        time.sleep(0.02)
    assert 0 < now["progress"] < 1 and now["state"]["job_count"] == 1
    getattr(client, how)()
    thread.join(60)
    (error,) = failed
    assert error.args[0] == 500 and "the job was cancelled" in error.args[1]
    (last,) = JobQueue(server.jobs_dir).last(1)
    assert last.state is State.CANCELLED
    idle = client.get_progress()
    assert (idle["progress"], idle["state"]["job_count"]) == (0, 0)


@pytest.mark.slow
def test_errors_are_sentences(client: Any, server: Server) -> None:
    for asked, said in (
        ({"prompt": "a", "enable_hr": True}, "enable_hr True is not supported here"),
        ({"prompt": "a", "sampler_name": "X"}, "sampler_name 'X' is not known"),
        ({"prompt": "a", "width": 60, "height": 64}, "--width 60 is not a multiple of 8"),
        ({"prompt": "a", "batch_size": 3, "n_iter": 4}, "12 images are more than the 10"),
        ({"prompt": "a", "override_settings": {"sd_model_checkpoint": "b"}}, "'b' is not here"),
    ):
        with pytest.raises(RuntimeError) as caught:
            client.txt2img(**asked)
        assert caught.value.args[0] == 400 and said in caught.value.args[1]
        assert str(server.jobs_dir) not in caught.value.args[1]


def test_progress_in_the_words_of_the_web_ui(tmp_path: Path) -> None:
    queue = JobQueue(tmp_path / "jobs")
    waiting = queue.add(tmp_path / "a", STEPS)
    idle = progress_of([], None, None, with_picture=True)
    assert (idle["progress"], idle["state"]["job_count"], idle["current_image"]) == (0, 0, None)
    first = progress_of([waiting], None, None, with_picture=True)
    assert (first["progress"], first["state"]["job_count"]) == (0, 1)
    job = queue.claim([1], "w")
    assert job is not None
    live = Live(stage=2, done=5, total=20, seconds_left=1.5, preview=b"jpeg")
    told = progress_of([job], job, live, with_picture=True)
    state = told["state"]
    assert (told["progress"], told["eta_relative"], told["textinfo"]) == (0.25, 1.5, "stage 2")
    assert (state["sampling_step"], state["sampling_steps"], state["job"]) == (5, 20, "a")
    assert base64.b64decode(told["current_image"]) == b"jpeg"
    assert progress_of([job], job, live, with_picture=False)["current_image"] is None
    begun = progress_of(
        [job], job, replace(live, stage=1, total=0, preview=None), with_picture=True
    )
    assert 0 < begun["progress"] < 0.1 and begun["state"]["sampling_steps"] == 0


def test_options_are_those_of_the_server(tmp_path: Path) -> None:
    flags = {"clip_skip": 1, "image_format": "webp", "embedding": ["a/b.safetensors:<x>", "c.pt"]}
    service = Service(tmp_path / "jobs", flags)
    app = FastAPI()
    app.include_router(router_of(service, Catalog(own_model="mine")))
    with TestClient(app) as client:
        options = client.get("/sdapi/v1/options").json()
        loaded = client.get("/sdapi/v1/embeddings").json()["loaded"]
    service.close()
    assert (options["CLIP_stop_at_last_layers"], options["samples_format"]) == (2, "webp")
    assert [*loaded] == ["<x>", "c"]
