"""A server without room on the disk or memory on the device: it says so, and goes on."""

import subprocess
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest

from tests.faults.servers import stages_of
from tests.serving.conftest import Server, start_server

SIZE = 16_000_000  # bytes of the disk


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One whose jobs folder is a disk of its own."""
    disk = tmp_path_factory.mktemp("disk")
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        found = start_server(disk / "jobs")
        try:
            yield found
        finally:
            found.process.terminate()
            found.process.wait(120)
    finally:
        subprocess.run(["umount", disk], check=True)


def ask(server: Server, prompt: str, **fields: Any) -> httpx.Response:
    body = {"prompt": prompt, "seed": 1, **fields}
    return httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=300)


def picture(server: Server, prompt: str) -> str:
    answer = ask(server, prompt)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["data"][0]["b64_json"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("left", "said"),  # bytes: too few for a job, its embeddings, its picture
    [
        (0, "is full): free its disk"),
        (40_000, "stage1_embeddings.safetensors cannot be written (No space"),
        (300_000, "output_image.png cannot be written (No space"),
    ],
)
def test_a_full_disk_is_said_and_passes(server: Server, left: int, said: str) -> None:
    expected = picture(server, "a red star")
    balloon, free = server.jobs_dir.parent / "others", psutil.disk_usage(str(server.jobs_dir)).free
    balloon.write_bytes(bytes(free - left))
    try:
        answer = ask(server, "a blue ring", size="512x512")
    finally:
        balloon.unlink()
    assert answer.status_code == 500, answer.text
    message = answer.json()["error"]["message"]
    assert said in message and str(server.jobs_dir) not in message
    assert picture(server, "a red star") == expected


@pytest.mark.slow
def test_memory_that_the_device_has_not_is_said_and_passes(server: Server) -> None:
    expected = picture(server, "a red star")
    process = stages_of(server.process)["stages on devices"]
    limits, held = process.rlimit(psutil.RLIMIT_AS), process.memory_info().vms
    process.rlimit(psutil.RLIMIT_AS, (held + 2_000_000_000, limits[1]))
    try:
        answer = ask(server, "a blue ring", size="1024x1024", n=8, num_inference_steps=1)
    finally:
        process.rlimit(psutil.RLIMIT_AS, limits)
    assert answer.status_code == 500, answer.text
    assert "out of memory" in answer.json()["error"]["message"]
    assert process.is_running() and picture(server, "a red star") == expected
