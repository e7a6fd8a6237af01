"""The server as a process: what it refuses, that jobs outlive it, how it ends."""

import base64
import io
import json
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

from common import private_cache
from common.errors import BadSettingError
from common.files import artifacts
from common.files.artifacts import MADE_BY
from common.files.stage_table import LATENTS_FILE
from common.serving.job_queue import WORKERS_FOLDER, JobQueue
from common.serving.jobs import Job, State
from common.serving.server import listening, model_name, refuse_open_address
from common.serving.stages import Stages
from common.serving.warm import SERVERS_FOLDER
from tests.conftest import Run
from tests.refusals import expect, refusal
from tests.serving.conftest import Server, start_server


def test_an_address_that_is_open_needs_a_key() -> None:
    for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"):
        refuse_open_address(host, None)
    for host in ("0.0.0.0", "::", "192.168.0.2", "example.org"):
        with refusal(BadSettingError, f"--host {host}: others can reach it: give --api_key"):
            refuse_open_address(host, None)
        refuse_open_address(host, "key")


def test_a_checkpoint_is_told_without_its_folder(tmp_path: Path) -> None:
    assert model_name({}) == "models/demo"
    assert model_name({"model_id": "stabilityai/sdxl"}) == "stabilityai/sdxl"
    assert model_name({"model_id": "/home/someone/sdxl.safetensors"}) == "sdxl.safetensors"
    (tmp_path / "own.yaml").write_text("model_id: /home/someone/else")
    assert model_name({"config": tmp_path / "own.yaml"}) == "else"


def test_a_port_that_is_taken() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        refusal(BadSettingError, "cannot be used", "choose another"),
        listening("127.0.0.1", taken.getsockname()[1]),
    ):
        pass
    for host, port in (("no.such.host.invalid", 1), ("127.0.0.1", 70_000), ("127.0.0.1", -1)):
        with refusal(BadSettingError, "cannot be used"), listening(host, port):
            pass


def test_flags_that_do_not_go_with_it(run_all: Run, tmp_path: Path) -> None:
    folder = ("--output_dir", tmp_path / "jobs")
    expect(run_all("--serve", *folder, "--prompt=a"), 2, "--prompt does not go with --serve")
    expect(run_all("--serve", *folder, "--sweep=seed=1,2"), 2, "--sweep does not go with --serve")
    expect(run_all("--port=81", *folder), 2, "--port is for --serve")
    expect(run_all("--serve", *folder, "--seed=3"), 2, "--seed does not go with --serve")
    expect(run_all("--serve", *folder, "--force"), 2, "--force does not go with --serve")
    expect(run_all("--serve", *folder, "--host=0.0.0.0"), 2, "--host 0.0.0.0: others can reach")
    expect(run_all("--serve", *folder, "--model_id=/none"), 2, "neither an existing folder")
    assert not (tmp_path / "jobs").exists()


@pytest.mark.slow
def test_a_second_server_of_the_same_jobs(server: Server, run_all: Run) -> None:
    result = run_all("--serve", "--port=0", "--output_dir", server.jobs_dir)
    expect(result, 5, "another server has the jobs folder")


def wait_for_stage_2(queue: JobQueue) -> Job:
    """A job, once its stage 2 runs."""
    until = time.monotonic() + 120
    while not (at_work := [job for job in queue.jobs(State.RUNNING) if job.step.stage == 2]):
        assert time.monotonic() < until
        time.sleep(0.01)
    return at_work[0]


@pytest.mark.slow
def test_requests_that_wait_are_denoised_at_once(server: Server, tmp_path: Path) -> None:
    """Other prompts, seeds, steps and schedulers: each picture as it is alone."""
    asked = [
        {"prompt": f"a ring {seed}", "seed": seed, "num_inference_steps": 4 + seed % 3}
        | {"scheduler": ("euler", "ddim", "dpmpp_2m")[seed % 3], "guidance_scale": 3.0 + seed}
        for seed in range(9)
    ]
    url, found = f"{server.url}/v1/images/generations", dict[int, np.ndarray]()

    def ask(body: dict[str, Any]) -> None:
        response = httpx.post(url, json=body, timeout=300)
        assert response.status_code == 200, response.text
        answer = response.json()
        data = base64.b64decode(answer["data"][0]["b64_json"])
        found[body.get("seed", -1)] = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

    busy = threading.Thread(
        target=ask, args=({"prompt": "a star", "num_inference_steps": 150, "n": 10},)
    )
    busy.start()
    queue = JobQueue(server.jobs_dir)
    wait_for_stage_2(queue)
    threads = [threading.Thread(target=ask, args=(body,)) for body in asked]
    for thread in threads:
        thread.start()
    for thread in (busy, *threads):
        thread.join()
    sizes = [
        artifacts.inspect(job.run_dir / LATENTS_FILE).header.provenance[MADE_BY][0]["batch_size"]
        for job in queue.last(len(asked))
    ]
    assert max(sizes) == 8, sizes
    with Stages(height=64, width=64, mesh="single") as stages:
        for body in asked:
            alone = stages.run(
                output_dir=tmp_path / str(body["seed"]), **body | {"prompt": [body["prompt"]]}
            )
            (picture,) = alone.pictures
            apart = np.abs(np.asarray(picture).astype(int) - found[body["seed"]]).max()
            assert apart <= 1, body


@pytest.mark.slow
@pytest.mark.long
def test_a_stage_that_is_killed_is_begun_again_and_the_picture_comes(server: Server) -> None:
    answers: list[httpx.Response] = []

    def ask() -> None:
        body = {"prompt": "a ring", "num_inference_steps": 150, "n": 10}
        url = f"{server.url}/v1/images/generations"
        answers.append(httpx.post(url, json=body, timeout=120))

    asking, queue = threading.Thread(target=ask), JobQueue(server.jobs_dir)
    asking.start()
    os.kill(int(str(wait_for_stage_2(queue).worker).split("-")[1]), signal.SIGKILL)
    asking.join()
    assert answers[0].status_code == 200 and len(answers[0].json()["data"]) == 10


@pytest.mark.slow
def test_it_drains_and_goes_on_when_it_is_back(tmp_path: Path) -> None:
    first = start_server(tmp_path / "jobs")
    statuses: list[int] = []

    def ask(number: int) -> None:
        body = {"prompt": f"a ring {number}", "num_inference_steps": 150, "n": 10}
        answer = httpx.post(f"{first.url}/v1/images/generations", json=body, timeout=120)
        statuses.append(answer.status_code)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    queue = JobQueue(first.jobs_dir)
    wait_for_stage_2(queue)
    children = psutil.Process(first.process.pid).children()
    first.process.send_signal(signal.SIGTERM)
    assert first.process.wait(90) == 143
    for thread in threads:
        thread.join(30)
    assert not any(child.is_running() for child in children)
    assert len(statuses) == 2 and set(statuses) <= {200, 503}
    assert not list((first.jobs_dir / WORKERS_FOLDER).glob("*.json"))
    chips = f"--chips=0-{len(os.sched_getaffinity(0)) - 1}"
    own = (chips, "--keep=1", "--max_wait_ms=5")  # of the processes that serve stages
    second = start_server(tmp_path / "jobs", *own, "--keep_jobs=1")
    commands = [child.cmdline() for child in psutil.Process(second.process.pid).children()]
    assert sorted(len({*own} & {*command}) for command in commands) == [2, 3]
    # With chips of their own it is none for run_all.sh, whose own runs have all there are.
    for each in (private_cache.folder() / SERVERS_FOLDER).glob("*.json"):
        assert json.loads(each.read_text())["jobs_dir"] != str(first.jobs_dir)
    until = time.monotonic() + 240
    while not all(job.has_ended for job in queue.jobs()):
        assert time.monotonic() < until
        time.sleep(0.05)
    assert [job.state for job in queue.jobs()] == [State.DONE] * 2
    second.process.terminate()
    assert second.process.wait(60) == 143
