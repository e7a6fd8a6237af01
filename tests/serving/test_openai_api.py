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
from common.serving.openai_api import GenerationRequest
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
    client: openai.OpenAI, tmp_path: Path, stage: Run
) -> None:
    own = {"seed": 7, "negative_prompt": "dark", "num_inference_steps": 3, "scheduler": "ddim"}
    answer = client.images.generate(
        model="models/demo", prompt="a red star", size="96x64", extra_body=own
    )
    assert answer.data is not None and answer.data[0].b64_json is not None
    found = pixels(answer.data[0].b64_json)
    flags = [f"--{name}={value}" for name, value in own.items()]
    folder = ("--output_dir", tmp_path / "run")
    first = stage(1, *folder, "--prompt=a red star", "--height=64", "--width=96", *flags)
    assert first.returncode == 0, first.stderr
    for number in (2, 3):
        assert stage(number, *folder, "--mesh=single").returncode == 0
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
    assert {job.state for job in queue.jobs()} == {State.DONE}


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
