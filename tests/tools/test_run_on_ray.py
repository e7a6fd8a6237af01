"""A list on two nodes of Ray: the pictures of run_all.sh, whatever dies meanwhile."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image
from pyarrow import parquet

from common.files.picture_files import read_pixels
from common.runs.in_turn import flags_of_a_run
from tests.conftest import PROJECT_DIR, RUN_ALL
from tools.run_on_ray import REFUSED

SMALL = ("--height=64", "--width=64", "--mesh=single", "--seed=5")
WORDS = ("star", "ring", "cross"), ("red", "green", "blue", "yellow")
TOOL = PROJECT_DIR / "tools" / "run_on_ray.py"


def rows(count: int) -> list[dict[str, Any]]:
    """Of mixed prompts, seeds and steps."""
    found: list[dict[str, Any]] = []
    for k in range(count):
        row = {"prompt": f"a {WORDS[1][k % 4]} {WORDS[0][k % 3]}, {k}"}
        row["num_inference_steps"] = 2 + k % 3
        found.append(row | ({"seed": k} if k % 5 == 0 else {}))
    return found


def write(path: Path, lines: Sequence[Any]) -> Path:
    path.write_text("".join(f"{x if isinstance(x, str) else json.dumps(x)}\n" for x in lines))
    return path


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return own | {"JAX_PLATFORMS": "cpu"}


@pytest.fixture(scope="module")
def by_run_all(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Path:
    """Of the same rows in one run."""
    folder = tmp_path_factory.mktemp("run")
    prompts = write(folder / "prompts.jsonl", rows(60))
    command = [sys.executable, RUN_ALL, "--prompts_file", prompts, "--output_dir", folder / "run"]
    subprocess.run([*command, *SMALL, "--warm=never"], check=True, env=environment)
    return folder / "run"


@pytest.fixture
def cluster(environment: dict[str, str]) -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.delenv("XLA_FLAGS", raising=False)
        found = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
        found.add_node(num_cpus=2)
        yield found
        found.shutdown()


def start(prompts: Path, target: Path, environment: dict[str, str], *flags: str) -> Any:
    return subprocess.Popen(
        [sys.executable, TOOL, prompts, "--output_dir", target, "--shard_images=8", *SMALL, *flags],
        env=environment,
        stderr=target.with_suffix(".log").open("a"),
        stdout=subprocess.DEVNULL,
        text=True,
    )


def check(target: Path, expected: Path, count: int) -> None:
    """All pictures are there, once, and those of the run."""
    index = parquet.read_table(target / "index.parquet").to_pylist()
    assert [row["row"] for row in index] == list(range(count))
    lines = [json.loads(line) for line in (expected / "images.jsonl").read_text().splitlines()]
    for row, line in zip(index, lines, strict=False):
        assert (row["prompt"], row["seed"]) == (line["prompt"], line["seed"])
        found = read_pixels(target / row["file"]).astype(int)
        assert np.abs(found - read_pixels(expected / line["file"])).max() <= 1, row
    shards = [path.name for path in (target / "shards").iterdir()]
    assert sorted(shards) == sorted(path.stem for path in (target / "index").iterdir())


def processes_of(name: str) -> list[psutil.Process]:
    """Ray's processes that have a pool's class in their titles."""
    found = []
    for process in psutil.process_iter():
        try:
            if name in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_for_shards(target: Path, count: int, run: Any) -> None:
    until = time.monotonic() + 240
    while len(list((target / "index").glob("*.parquet"))) < count:
        assert run.poll() is None and time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.long
def test_all_rows_are_made_when_a_node_and_a_process_and_the_driver_die(
    cluster: Any, by_run_all: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    prompts, target = write(tmp_path / "a.jsonl", rows(60)), tmp_path / "pictures"
    joined = f"--address={cluster.address}"
    first = start(prompts, target, environment, joined, "--makers=2")
    wait_for_shards(target, 1, first)
    own = {child.pid for child in psutil.Process().children(recursive=True)}
    next(each for each in processes_of("_MakeShards") if each.pid in own).kill()
    wait_for_shards(target, 3, first)
    first.send_signal(signal.SIGKILL)
    first.wait()
    done = {path.name: path.stat().st_mtime_ns for path in (target / "index").iterdir()}
    second = start(prompts, target, environment, joined)
    wait_for_shards(target, len(done) + 1, second)
    cluster.remove_node(next(node for node in cluster.worker_nodes))
    cluster.add_node(num_cpus=2)
    assert second.wait(300) == 0, target.with_suffix(".log").read_text()
    check(target, by_run_all, 60)
    for name, time_of in done.items():
        assert (target / "index" / name).stat().st_mtime_ns == time_of


def test_what_a_list_does_not_take_is_a_flag_of_a_run() -> None:
    assert REFUSED.keys() <= {flag.name for flag in flags_of_a_run()}


WITHOUT_RAY = """
import importlib.util, runpy, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "ray" else find(name, *more)
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def test_without_ray_a_sentence_says_how_to_get_it() -> None:
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_RAY, TOOL], capture_output=True, text=True
    )
    assert result.returncode == 5
    assert result.stderr == "error: ray is not installed: tools/set_up.sh ray installs it\n"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("seed_offset: 3", "seed_offset does not go with a list: give it as a flag"),
        ("prompt_syntax: dynamic", "prompt_syntax does not go with a list: write the combinat"),
        ("init_latents: x", "init_latents does not go with a list: leave it out"),
    ],
)
def test_settings_of_a_config_file_that_are_no_lists(
    tmp_path: Path, config: str, said: str
) -> None:
    file = write(tmp_path / "a.yaml", [config])
    prompts = write(tmp_path / "a.jsonl", rows(1))
    result = subprocess.run(
        [sys.executable, TOOL, prompts, "--config", file, "--output_dir", tmp_path / "x"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and said in result.stderr


@pytest.mark.slow
@pytest.mark.long
def test_bad_rows_are_told_and_the_rest_is_made(
    environment: dict[str, str], tmp_path: Path
) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    own: list[Any] = [row | {"image": str(tmp_path / "red.png")} for row in rows(8)]
    own[3]["image"] = str(tmp_path / "none.png")
    own[5] = "{"
    del own[6]["image"]
    prompts, target = write(tmp_path / "a.jsonl", own), tmp_path / "pictures"
    run = start(prompts, target, environment, "--strength=0.9")
    assert run.wait(300) == 0, target.with_suffix(".log").read_text()
    failed = parquet.read_table(target / "failed.parquet").to_pylist()
    assert [(row["row"], row["exit_code"]) for row in failed] == [(3, 3), (5, 2), (6, 2)]
    for row, words in zip(failed, ("none.png", "line 6", "has no image"), strict=True):
        assert words in row["error"]
    index = parquet.read_table(target / "index.parquet").to_pylist()
    assert [row["row"] for row in index] == [0, 1, 2, 4, 7]
    again = start(prompts, target, environment, "--strength=0.9", "--max_failures=0")
    assert again.wait(60) == 3 and "max_failures 0" in target.with_suffix(".log").read_text()
