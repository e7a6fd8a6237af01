"""Who may ask, how much, and what errors look like; no stage runs here."""

from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from common.serving.catalog import Catalog
from common.serving.http_app import make_app
from common.serving.job_queue import JobQueue
from common.serving.service import Service
from tests.serving.conftest import KEY


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"prompt": 3}, "prompt: Input should be a valid string"),
        ({"restore_faces": True}, "restore_faces True is not supported here: leave it out"),
    ],
)
def test_errors_have_the_form_of_the_api(
    keyed: TestClient, body: dict[str, object], said: str
) -> None:
    answer = keyed.post("/sdapi/v1/txt2img", json=body, headers=KEY)
    assert answer.status_code == 400
    expected = {"error": "invalid_request_error", "detail": said, "body": "", "errors": said}
    assert answer.json() == expected


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"a"', b"\xff", b'{"prompt": {"a": 1}}'])
def test_what_is_no_request_is_refused_in_a_sentence(keyed: TestClient, body: bytes) -> None:
    headers = {**KEY, "content-type": "application/json"}
    answer = keyed.post("/v1/images/generations", content=body, headers=headers)
    assert answer.status_code == 400 and answer.json()["error"]["message"]
    assert "Traceback" not in answer.text


@pytest.mark.parametrize(
    "path",
    ["/jobs/x", "/jobs/0123456789abcdef", "/jobs/%2e%2e%2fx/pictures/0", "/nowhere"],
)
def test_what_is_not_there(keyed: TestClient, path: str) -> None:
    answer = keyed.get(path, headers=KEY)
    assert answer.status_code == 404 and answer.json()["error"]["message"]


def test_jobs_are_listed_and_cancelled(keyed: TestClient, tmp_path: Path) -> None:
    from tests.serving.test_job_queue import STEPS

    queue = JobQueue(tmp_path / "jobs")
    runs = (tmp_path / "jobs" / "runs").resolve()
    job = queue.add(runs / "0123456789abcdef", STEPS)
    (told,) = keyed.get("/jobs", headers=KEY).json()
    assert (told["id"], told["state"], told["stage"]) == ("0123456789abcdef", "waiting", 1)
    one = keyed.get("/jobs/0123456789abcdef", headers=KEY).json()
    nothing = {"pictures": [], "settings": {}, "images": [], "reports": [], "artifacts": []}
    assert one == told | nothing
    assert keyed.delete("/jobs/0123456789abcdef", headers=KEY).json()["state"] == "cancelled"
    picture = keyed.get("/jobs/0123456789abcdef/pictures/0", headers=KEY)
    assert picture.status_code == 404 and "has no picture 0" in picture.text
    assert queue.claim([1], "w") is None
    (runs / "0123456789abcdef").mkdir()
    assert keyed.delete("/jobs/0123456789abcdef", headers=KEY).status_code == 200
    assert keyed.get("/jobs/0123456789abcdef", headers=KEY).status_code == 404
    assert not (runs / "0123456789abcdef").exists()
    other = queue.add(runs / "1123456789abcdef", STEPS)
    mine = queue.claim([1], "w")
    assert mine is not None and mine.number == other.number != job.number
    queue.end(mine, 5, f"{runs / 'x' / 'a.safetensors'} cannot be written: free it")
    error = keyed.get("/jobs/1123456789abcdef", headers=KEY).json()["error"]
    assert error == "a.safetensors cannot be written: free it"


def test_a_queue_that_is_full_says_when_to_come_again(keyed: TestClient, tmp_path: Path) -> None:
    from tests.serving.test_job_queue import STEPS

    queue = JobQueue(tmp_path / "jobs")
    for number in range(2):
        queue.add(Path(str(number)), STEPS)
    answer = keyed.post("/v1/images/generations", json={"prompt": "a"}, headers=KEY)
    assert answer.status_code == 429 and answer.headers["x-should-retry"] == "true"


def test_without_a_key_only_this_machines_names_are_answered(tmp_path: Path) -> None:
    """A page elsewhere can have its own name mean this machine."""
    service = Service(tmp_path / "jobs", {})
    app = make_app(service, Catalog(own_model="models/demo"), None, lambda: True)
    with TestClient(app) as client:
        for host in ("127.0.0.1:8000", "localhost", "[::1]:80"):
            assert client.get("/jobs", headers={"host": host}).status_code == 200
        for host in ("evil.example", "evil.example:8000", "localhost.evil.example", ""):
            for path in ("/jobs", "/", "/healthz"):
                answer = client.get(path, headers={"host": host})
                assert answer.status_code == 400 and "own names alone" in answer.text
    service.close()


def test_nothing_is_loaded_from_elsewhere(keyed: TestClient) -> None:
    for page in ("/docs", "/redoc"):
        assert keyed.get(page, headers=KEY).status_code == 404


def test_the_schema_is_told(keyed: TestClient) -> None:
    schema = keyed.get("/openapi.json", headers=KEY).json()
    assert {"/v1/images/generations", "/sdapi/v1/txt2img"} <= schema["paths"].keys()
    body = schema["paths"]["/v1/images/edits"]["post"]["requestBody"]["content"]
    assert body["multipart/form-data"]["schema"]["required"] == ["prompt", "image"]
