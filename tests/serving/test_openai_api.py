"""OpenAI's own client against the server."""

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from common.errors import BadSettingError
from common.serving.job_queue import JobQueue
from common.serving.jobs import State
from common.serving.openai_api import EditRequest, GenerationRequest
from tests.conftest import Run
from tests.refusals import refusal
from tests.serving.conftest import Server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any") as found:
        yield found


def pixels(encoded: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as picture:
        return np.asarray(picture.convert("RGB"))


@pytest.mark.slow
def test_a_picture_is_that_of_the_scripts(
    client: openai.OpenAI, tmp_path: Path, quick_stage: Run
) -> None:
    own = {"seed": 7, "negative_prompt": "dark", "num_inference_steps": 3, "scheduler": "ddim"}
    answer = client.images.generate(
        model="models/demo", prompt="a red star", size="96x64", extra_body=own
    )
    assert answer.data is not None and answer.data[0].b64_json is not None
    found = pixels(answer.data[0].b64_json)
    flags = [f"--{name}={value}" for name, value in own.items()]
    folder = ("--output_dir", tmp_path / "run")
    first = quick_stage(1, *folder, "--prompt=a red star", "--height=64", "--width=96", *flags)
    assert first.returncode == 0, first.stderr
    for number in (2, 3):
        assert quick_stage(number, *folder, "--mesh=single").returncode == 0
    with Image.open(tmp_path / "run" / "output_image.png") as expected:
        assert np.array_equal(found, np.asarray(expected.convert("RGB")))


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


PICTURE = np.zeros((64, 64, 3), np.uint8) + np.array([40, 90, 200], np.uint8)
ANEW = np.zeros((64, 64), np.uint8)
ANEW[16:48, 8:40] = 255  # a run's mask; OpenAI's is transparent there
BLACK = np.zeros((64, 64, 3), np.uint8)
OF_EDITS = {"seed": 11, "negative_prompt": "dark", "num_inference_steps": 4}


@pytest.mark.slow
@pytest.mark.parametrize("whose", ["mask", "image", "none"])
def test_an_edit_is_that_of_the_scripts_with_the_inverted_mask(
    client: openai.OpenAI, tmp_path: Path, quick_stage: Run, whose: str
) -> None:
    image, mask = tmp_path / "image.png", tmp_path / "mask.png"
    image.write_bytes(png(PICTURE))
    mask.write_bytes(png(ANEW))
    given: dict[str, Any] = {"image": png(PICTURE)}
    flags = [f"--{name}={value}" for name, value in OF_EDITS.items()]
    flags += ["--image", str(image), "--height=64", "--width=64"]
    own = dict(OF_EDITS)
    if whose == "none":
        own["strength"] = 0.6
        flags.append("--strength=0.6")
    else:
        flags += ["--mask_image", str(mask), "--keep_unmasked"]
        given["mask"] = ("mask.png", png(np.dstack([BLACK, 255 - ANEW])))
        if whose == "image":
            given = {"image": [png(np.dstack([PICTURE, 255 - ANEW]))]}  # a list of one: image[]
            image.write_bytes(png(np.where(ANEW[..., None] > 0, 255, PICTURE)))
    answer = client.images.edit(prompt="a red star", extra_body=own, **given)
    assert answer.data is not None and answer.data[0].b64_json is not None
    found = pixels(answer.data[0].b64_json)
    if whose != "none":
        assert np.array_equal(found[ANEW == 0], PICTURE[ANEW == 0])
        assert (found[ANEW > 0] != PICTURE[ANEW > 0]).any(1).mean() > 0.9
    folder = ("--output_dir", tmp_path / "run")
    first = quick_stage(1, *folder, "--prompt=a red star", *flags)
    assert first.returncode == 0, first.stderr
    for number in (0, 2, 3):
        assert quick_stage(number, *folder, "--mesh=single").returncode == 0
    with Image.open(tmp_path / "run" / "output_image.png") as expected:
        assert np.array_equal(found, np.asarray(expected.convert("RGB")))


@pytest.mark.slow
def test_several_pictures_by_their_addresses(client: openai.OpenAI, server: Server) -> None:
    answer = client.images.generate(
        prompt="a blue ring", n=2, response_format="url", output_format="webp", size="auto"
    )
    assert answer.data is not None and len(answer.data) == 2
    shown = []
    for each in answer.data:
        got = httpx.get(f"{server.url}{each.url}")
        assert got.headers["content-type"] == "image/webp"
        with Image.open(io.BytesIO(got.content)) as picture:
            shown.append(np.asarray(picture))
    assert shown[0].shape == (64, 64, 3) and not np.array_equal(*shown)


@pytest.mark.slow
def test_without_a_seed_each_request_is_another_picture(client: openai.OpenAI) -> None:
    first, second = (client.images.generate(prompt="a star").data for _ in range(2))
    assert first is not None and second is not None
    encoded = [str(each[0].b64_json) for each in (first, second)]
    assert not np.array_equal(*map(pixels, encoded))


@pytest.mark.slow
def test_a_retry_makes_no_second_job(server: Server) -> None:
    """The client says in a header that it has asked before; it sends no key."""
    body = {"prompt": "asked twice"}
    queue = JobQueue(server.jobs_dir)

    def ask(retry: str) -> Any:
        headers = {"x-stainless-retry-count": retry}
        url = f"{server.url}/v1/images/generations"
        answer = httpx.post(url, json=body, headers=headers, timeout=60)
        assert answer.status_code == 200
        return answer.json()["data"][0]["b64_json"]

    before = len(queue.jobs())
    first = ask("0")
    assert ask("1") == first and len(queue.jobs()) == before + 1
    assert ask("0") != first and len(queue.jobs()) == before + 2
    assert [job.state for job in queue.jobs()[-2:]] == [State.DONE] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"prompt": ""}, "prompt: String should have at least 1 character"),
        (
            {"prompt": "a", "model": "dall-e-3"},
            "model 'dall-e-3' is not here: there",
        ),
        ({"prompt": "a", "size": "wide"}, "size 'wide': give WIDTHxHEIGHT"),
        ({"prompt": "a", "size": "63x64"}, "--width 63 is not a multiple of 8"),
        ({"prompt": "a", "size": "8192x8192"}, "67108864 pixels are more than the 4194304"),
        ({"prompt": "a", "n": 11}, "11 images are more than the 10 that are allowed"),
        ({"prompt": "a", "quality": "hd"}, "quality: Input should be 'auto' or 'standard'"),
        ({"prompt": "a", "steps": 3}, "steps: Extra inputs are not permitted"),
        ({"prompt": "a", "scheduler": "../x"}, "scheduler: String should match pattern"),
        ({"prompt": "a", "scheduler": "eulr"}, "scheduler 'eulr'"),
        ({"prompt": "a", "num_inference_steps": 1000}, "1000 steps are more than the 150"),
        ({"prompt": "a", "stream": True}, "stream: Input should be False"),
    ],
    ids=str,
)
def test_what_is_refused_in_a_sentence(server: Server, asked: dict[str, Any], said: str) -> None:
    answer = httpx.post(f"{server.url}/v1/images/generations", json=asked, timeout=60)
    assert answer.status_code == 400 and answer.headers["x-should-retry"] == "false"
    error = answer.json()["error"]
    assert said in error["message"] and error["type"] == "invalid_request_error"
    assert str(server.jobs_dir) not in answer.text and "Traceback" not in answer.text


@pytest.mark.slow
def test_a_retry_of_an_edit_makes_no_second_job(server: Server) -> None:
    """Its body has another boundary."""
    queue, url = JobQueue(server.jobs_dir), f"{server.url}/v1/images/edits"

    def ask(retry: str) -> Any:
        headers = {"x-stainless-retry-count": retry}
        form: Any = {"data": {"prompt": "edited twice", "strength": "0.7"}}
        files = {"image[]": ("a.png", png(PICTURE))}
        answer = httpx.post(url, files=files, headers=headers, timeout=60, **form)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    before = len(queue.jobs())
    first = ask("0")
    assert ask("1") == first and len(queue.jobs()) == before + 1
    assert ask("0") != first and len(queue.jobs()) == before + 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "files", "said"),
    [
        ({}, {"image": b"GIF89a"}, "image is no PNG, JPEG or WebP"),
        ({}, {"mask": png(PICTURE)}, "image: send the picture to edit, as a file"),
        ({}, {"image": png(PICTURE), "mask": png(ANEW)}, "mask has no transparent part"),
        ({}, [("image[]", png(PICTURE)), ("image[]", png(PICTURE))], "image: one is taken"),
        ({"input_fidelity": "high"}, {"image": png(PICTURE)}, "input_fidelity: Input should be"),
        ({"frame_count": "2"}, {"image": png(PICTURE)}, "frame_count: Extra inputs are not"),
        ({"stream": "true"}, {"image": png(PICTURE)}, "stream: Input should be False"),
        ({"n": "two"}, {"image": png(PICTURE)}, "n: Input should be a valid integer"),
        ({"strength": "1.5"}, {"image": png(PICTURE)}, "strength: Input should be less than"),
        ({"strength": "0.1"}, {"image": png(PICTURE)}, "--strength 0.1"),
        ({"size": "60x64"}, {"image": png(PICTURE)}, "--width 60 is not a multiple of 8"),
    ],
    ids=str,
)
def test_edits_that_are_refused(
    server: Server, fields: dict[str, str], files: Any, said: str
) -> None:
    data = {"prompt": "a", **fields}
    answer = httpx.post(f"{server.url}/v1/images/edits", data=data, files=files, timeout=60)
    assert answer.status_code == 400 and said in answer.json()["error"]["message"], answer.text
    assert str(server.jobs_dir) not in answer.text and "Traceback" not in answer.text


@pytest.mark.slow
def test_the_client_reads_errors_and_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["models/demo"]
    with pytest.raises(openai.BadRequestError, match="is not a multiple of 8"):
        client.images.generate(prompt="a", size="63x63")  # type: ignore[call-overload]


def test_flags_of_a_request() -> None:
    asked = GenerationRequest(prompt="a", size="96x64", n=2, output_format="jpeg")
    assert asked.flags(seed=5) == {
        "prompt": ["a"],
        "num_images_per_prompt": 2,
        "seed": 5,
        "image_format": "jpg",
        "width": 96,
        "height": 64,
        **dict.fromkeys(("negative_prompt", "num_inference_steps", "guidance_scale", "scheduler")),
    }
    assert GenerationRequest(prompt="a", seed=0).flags(seed=5)["seed"] == 0
    with refusal(BadSettingError, "size '1x'"):
        GenerationRequest(prompt="a", size="1x").flags(seed=5)


def test_flags_of_an_edit() -> None:
    """A form's fields are texts, and those that are empty are none."""
    form = {"prompt": "a", "n": "2", "strength": "0.5", "seed": "", "stream": "false"}
    flags = EditRequest.model_validate(form | {"negative_prompt": ""}).flags(seed=5)
    of_both = GenerationRequest(prompt="a", n=2, negative_prompt="").flags(seed=5)
    assert flags == of_both | {"strength": 0.5}
