"""How far jobs are, written by one process and read by another."""

import io
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from common.progress import progress_bar, watched_by
from common.serving.job_queue import JobQueue
from common.serving.jobs import State
from common.serving.live import (
    LIVE_FOLDER,
    SECONDS_BETWEEN_FILES,
    Live,
    LiveWriter,
    has_listeners,
    read_live,
)
from tests.serving.conftest import Server

NAME = "0123456789abcdef"
WEIGHTS = np.array(
    [[0.5] * 3, [0.5, 0, 0], [0, 0.5, 0], [0] * 3, [0] * 3, [0] * 3]
)  # of 2 channels


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert not has_listeners(tmp_path)
    (tmp_path / LIVE_FOLDER).mkdir()
    assert has_listeners(tmp_path) and read_live(tmp_path, NAME, 2) is None
    writer = LiveWriter(tmp_path, NAME, 2, WEIGHTS)
    with watched_by(writer), progress_bar(4, "denoise", "step") as bar:
        begun = Live(stage=2, done=0, total=4, seconds_left=None, preview=None)
        assert read_live(tmp_path, NAME, 2) == begun and read_live(tmp_path, NAME, 3) is None
        bar.update()
        assert read_live(tmp_path, NAME, 2) == begun  # a moment ago
        assert not writer.wants_look()
        time.sleep(SECONDS_BETWEEN_FILES)
        assert writer.wants_look() and not writer.wants_look()
        red, green = np.zeros((2, 2, 8, 8), np.float32)
        red[0], green[1] = 1, 1
        red[1], green[0] = -1, -1
        bar.update(look=lambda: {1: green, 0: red})
        found = read_live(tmp_path, NAME, 2)
    assert found is not None and (found.done, found.total) == (2, 4)
    assert found.seconds_left is not None and found.preview is not None
    with Image.open(io.BytesIO(found.preview)) as picture:
        assert picture.format == "JPEG" and picture.size == (128, 64)  # side by side
        left, right = picture.getpixel((20, 30)), picture.getpixel((108, 30))
    assert isinstance(left, tuple) and isinstance(right, tuple)
    assert left[0] > 250 and left[1] < 60 and right[0] < 60 and right[1] > 250
    writer.end()
    assert not [*(tmp_path / LIVE_FOLDER).iterdir()]


def test_without_weights_nobody_looks(tmp_path: Path) -> None:
    writer = LiveWriter(tmp_path, NAME, 2, None)
    time.sleep(SECONDS_BETWEEN_FILES)
    assert not writer.wants_look()
    with watched_by(writer), progress_bar(4, "denoise", "step") as bar:
        bar.update()  # there is no folder: nothing is written, and nothing ends
    writer.end()
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_a_job_of_a_server_is_seen_growing(server: Server) -> None:
    queue, url = JobQueue(server.jobs_dir), f"{server.url}/v1/images/generations"
    body: dict[str, object] = {"prompt": "a large red star", "size": "128x128"}
    httpx.post(url, json=body, timeout=120)
    time.sleep(5)  # in which the process has nothing else to do than the fit of previews
    with ThreadPoolExecutor() as pool:
        body |= {"num_inference_steps": 150}
        asking = pool.submit(httpx.post, url, json=body, timeout=120)
        seen = []
        while not asking.done():
            for job in queue.jobs(State.RUNNING):
                seen.append(read_live(server.jobs_dir, job.run_dir.name, 2))
            time.sleep(0.02)
    assert asking.result().status_code == 200
    found = [live for live in seen if live is not None]
    steps = [live for live in found if live.preview is not None]
    assert len({live.preview for live in steps}) > 3
    assert [live.done for live in steps] == sorted(live.done for live in steps)
    assert {live.total for live in steps} == {150} and steps[-1].done > steps[0].done
    assert not [*(server.jobs_dir / LIVE_FOLDER).iterdir()]
