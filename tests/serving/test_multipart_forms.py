"""Forms as clients send them, and what is no such form."""

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient

from common.errors import BadSettingError
from common.serving.multipart_forms import LONGEST_FIELD, digest_of, read_form


@pytest.fixture
def client() -> Iterator[TestClient]:
    app = FastAPI()

    @app.post("/form")
    async def form(request: Request) -> JSONResponse:
        try:
            fields, files = await read_form(request, ("image", "mask"))
        except BadSettingError as error:
            return JSONResponse({"said": str(error)}, 400)
        told = {name: data.decode() for name, data in files.items()}
        return JSONResponse({"fields": fields, "files": told, "digest": digest_of(fields, files)})

    with TestClient(app) as found:
        yield found


def test_fields_and_files_by_either_name(client: TestClient) -> None:
    for name in ("image", "image[]"):
        files = {name: b"abc", "mask": ("m.png", b"de")}
        told = client.post("/form", data={"prompt": "a", "size": ""}, files=files).json()
        assert told["files"] == {"image": "abc", "mask": "de"}
        assert told["fields"] == {"prompt": "a", "size": ""}


def test_a_digest_is_that_of_the_content(client: TestClient) -> None:
    """The boundary is another one each time; names and order of files are not what counts."""

    def digest(prompt: str, **files: bytes) -> str:
        answer = client.post("/form", data={"prompt": prompt}, files=files)
        return str(answer.json()["digest"])

    first = digest("a", image=b"x", mask=b"y")
    assert first == digest("a", mask=b"y", image=b"x")
    others = [digest("b", image=b"x", mask=b"y"), digest("a", image=b"y", mask=b"x")]
    others += [digest("a", image=b"x"), digest("a", image=b"xy")]
    assert len({first, *others}) == 5


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        ({"json": {"prompt": "a"}}, "send a multipart form"),
        ({"files": [("image[]", b"a"), ("image[]", b"b")]}, "image: one is taken"),
        ({"files": [("image", b"a"), ("image[]", b"b")]}, "image: one is taken"),
        ({"data": {"image": "abc"}, "files": {"mask": b"a"}}, "image: send it as a file"),
        ({"files": {"prompt": b"a"}}, "prompt: it is no file"),
        ({"data": {"a": ["1", "2"]}, "files": {"mask": b"a"}}, "a: one is taken"),
        (
            {"data": {"prompt": "a" * (LONGEST_FIELD + 1)}, "files": {"mask": b"a"}},
            "send pictures as files, which have a filename; other fields have at most 1000000",
        ),
        (
            {"content": b"--x", "headers": {"content-type": "multipart/form-data"}},
            "the form cannot be read (Missing boundary in multipart)",
        ),
    ],
    ids=str,
)
def test_what_is_refused(client: TestClient, sent: dict[str, Any], said: str) -> None:
    answer = client.post("/form", **sent)
    assert answer.status_code == 400 and said in answer.json()["said"]
