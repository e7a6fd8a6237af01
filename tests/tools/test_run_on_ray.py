"""A list on two nodes of Ray: the pictures of run_all.sh, whatever dies meanwhile."""

import io
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import psutil
import pytest
import requests
from PIL import Image
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from common.errors import BadInputFileError, BadSettingError, NotFiniteError, StageError
from common.runs.in_turn import flags_of_a_run
from common.scale.makers import folder_of_shards
from common.scale.shards import Failure
from tests.faults import many_rows
from tests.faults.ray_lists import (
    NODE,
    TOOL,
    done_shards,
    mixed_rows,
    processes_of,
    run_all,
    start,
    two_nodes,
    wait_for_shards,
    write_rows,
    wrong_pictures,
)
from tests.object_store import BUCKET, object_store
from tests.refusals import refusal
from tests.tiny_checkpoints import save_tiniest
from tools.run_on_ray import REFUSED, refuse_failures

ROWS, OF_A_SHARD = 60, "--shard_images=8"


@pytest.fixture(scope="module")
def by_run_all(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the same rows in one run."""
    folder = tmp_path_factory.mktemp("run")
    return run_all(write_rows(folder / "a.jsonl", mixed_rows(ROWS)), folder / "run")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with object_store(), two_nodes() as found:
        yield found


@pytest.mark.slow
def test_all_rows_are_made_when_a_node_and_a_process_and_the_driver_die(
    cluster: Any, by_run_all: Path, tmp_path: Path
) -> None:
    prompts, target = write_rows(tmp_path / "a.jsonl", mixed_rows(ROWS)), tmp_path / "pictures"
    log, flags = tmp_path / "log", (f"--address={cluster.address}", OF_A_SHARD)
    first = start(prompts, target, log, *flags, "--makers=2")
    wait_for_shards(target, 1, first)
    processes_of("_MakeShards")[0].kill()
    wait_for_shards(target, 3, first)
    first.send_signal(signal.SIGKILL)
    first.wait()
    index = target / "index"
    done = {path: path.stat().st_mtime_ns for path in index.iterdir()}
    second = start(prompts, target, log, *flags)
    wait_for_shards(target, len(done_shards(target)) + 1, second)
    assert second.poll() is None, log.read_text()
    cluster.remove_node(next(iter(cluster.worker_nodes)))
    cluster.add_node(**NODE)
    assert second.wait(300) == 0, log.read_text()
    assert wrong_pictures(target, by_run_all, ROWS) == []
    assert {path: path.stat().st_mtime_ns for path in done} == done


@pytest.mark.slow
def test_hosts_that_compute_together(cluster: Any, by_run_all: Path, tmp_path: Path) -> None:
    """Each has two devices, and the mesh four; one of them dies, and all are begun again.

    So does the process that has begun them, whose places nobody else would give back.
    """
    prompts, target = write_rows(tmp_path / "a.jsonl", mixed_rows(24)), tmp_path / "pictures"
    own = (f"--address={cluster.address}", OF_A_SHARD, "--together=2", "--mesh=data=4")
    run = start(prompts, target, tmp_path / "log", *own)
    wait_for_shards(target, 1, run)
    processes_of("Member")[-1].kill()
    wait_for_shards(target, 2, run)
    processes_of("_MakeShards")[0].kill()
    assert run.wait(300) == 0, (tmp_path / "log").read_text()
    assert wrong_pictures(target, by_run_all, 24) == []


@pytest.mark.slow
def test_hosts_that_come_later(cluster: Any, by_run_all: Path, tmp_path: Path) -> None:
    """Those with devices are not there yet; two come, one after the other."""
    prompts, target = write_rows(tmp_path / "a.jsonl", mixed_rows(ROWS)), tmp_path / "pictures"
    log, own = tmp_path / "log", ("--host_chips=TPU:1", "--shard_images=1", "--encoders=1")
    run = start(prompts, target, log, f"--address={cluster.address}", *own)
    until = time.monotonic() + 120
    while not processes_of("_EncodeShards") and time.monotonic() < until:
        time.sleep(0.2)
    assert processes_of("_MakeShards") == []
    came = []
    try:
        for count in (1, 2):
            came.append(cluster.add_node(**NODE, resources={"TPU": 1}))
            wait_for_shards(target, 2 * count, run)
        until = time.monotonic() + 60
        while len(processes_of("_MakeShards")) < 2:
            assert run.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.05)
        assert run.wait(300) == 0, log.read_text()
    finally:
        for node in came:
            cluster.remove_node(node)
    assert wrong_pictures(target, by_run_all, ROWS) == []


@pytest.mark.slow
def test_five_hundred_rows_in_an_object_store(cluster: Any, tmp_path: Path) -> None:
    target, own = f"s3://{BUCKET}/pictures", ("--format=webdataset", "--shard_images=50")
    made = many_rows.make(cluster, 500, target, tmp_path, *own)
    assert many_rows.too_much(made) == []
    store = fsspec.filesystem("s3")
    index = parquet.read_table(io.BytesIO(store.cat_file(f"{target}/index.parquet")))
    assert index["row"].to_pylist() == [*range(500)]
    assert len(store.ls(f"{target}/shards")) == 10
    found = metrics_of(cluster)
    assert found["stage 1"] >= 500 and found["stages 0, 2 and 3"] >= 500


def metrics_of(cluster: Any) -> dict[str, float]:
    """The pictures that Prometheus sees at the nodes, by pool."""
    found = dict[str, float]()
    until = time.monotonic() + 30
    while sum(found.values()) < 1000 and time.monotonic() < until:
        found.clear()
        for node in (cluster.head_node, *cluster.worker_nodes):
            page = requests.get(f"http://127.0.0.1:{node.metrics_export_port}/metrics", timeout=10)
            for line in page.text.splitlines():
                if line.startswith("ray_staged_diffusion_pictures"):
                    pool = line.partition('pool="')[2].partition('"')[0]
                    found[pool] = found.get(pool, 0) + float(line.split()[-1])
        time.sleep(0.5)
    return found


@pytest.mark.slow
def test_rows_at_which_processes_end_are_told(tmp_path: Path) -> None:
    """As where the memory does not suffice for them: whatever has one on its list is killed."""
    own = [{"prompt": "a cross" if k == 4 else f"a star, {k}"} for k in range(6)]
    prompts, target, log = write_rows(tmp_path / "a.jsonl", own), tmp_path / "out", tmp_path / "log"
    flags = (f"--model_id={save_tiniest(tmp_path / 'model')}", "--num_inference_steps=1")
    run = start(prompts, target, log, *flags, "--shard_images=6")
    killed, until = 0, time.monotonic() + 300
    while run.poll() is None:
        assert time.monotonic() < until, log.read_text()
        for path in folder_of_shards().glob("*/prompts.jsonl"):
            with suppress(OSError, psutil.Error):
                process = psutil.Process(int(path.parent.name.partition("-")[0]))
                if "_MakeShards" in process.cmdline()[0] and "a cross" in path.read_text("utf-8"):
                    process.kill()
                    process.wait()
                    killed += 1
        time.sleep(0.002)
    assert run.returncode == 0, log.read_text()
    assert killed == 4  # two with all rows, two with this one alone
    (failed,) = parquet.read_table(target / "failed.parquet").to_pylist()
    assert (failed["row"], failed["exit_code"]) == (4, 137)
    assert "line 5: the process ended at it 2 times" in failed["error"]
    assert parquet.read_table(target / "index.parquet")["row"].to_pylist() == [0, 1, 2, 3, 5]


@pytest.mark.slow
def test_bad_rows_are_told_and_the_rest_is_made(tmp_path: Path) -> None:
    """On this machine alone, with a word that no number stands for."""
    model = save_tiniest(tmp_path / "model")
    weights = model / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    (token,) = CLIPTokenizer.from_pretrained(model / "tokenizer")("cross").input_ids[1:-1]
    (words,) = (each for each in tensors if each.endswith("token_embedding.weight"))
    tensors[words][token] = float("nan")
    save_file(tensors, weights, {"format": "pt"})
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    own: list[Any] = [
        {"prompt": f"a star, {k}", "image": str(tmp_path / "red.png")} for k in range(8)
    ]
    own[2]["prompt"] = "a cross"
    own[3]["image"] = str(tmp_path / "none.png")
    own[5] = "{"
    own[6] = "a"
    prompts, target, log = write_rows(tmp_path / "a.jsonl", own), tmp_path / "out", tmp_path / "log"
    content = prompts.read_bytes().splitlines()
    content[6] = b'{"prompt": "\xff"}'
    prompts.write_bytes(b"\n".join(content))
    flags = (f"--model_id={model}", "--num_inference_steps=2", "--strength=0.9")
    assert start(prompts, target, log, *flags).wait(300) == 0, log.read_text()
    failed = parquet.read_table(target / "failed.parquet").to_pylist()
    assert [(row["row"], row["exit_code"]) for row in failed] == [(2, 4), (3, 3), (5, 2), (6, 2)]
    said = ("not finite", "none.png", "line 6", "is not UTF-8")
    for row, words in zip(failed, said, strict=True):
        assert words in row["error"]
    index = parquet.read_table(target / "index.parquet").to_pylist()
    assert [row["row"] for row in index] == [0, 1, 4, 7]
    again = start(prompts, target, log, *flags, "--max_failures=0")
    assert again.wait(60) == 4 and "max_failures 0" in log.read_text()


@pytest.mark.parametrize("error", [BadSettingError, BadInputFileError, NotFiniteError])
def test_too_many_failures_end_with_the_first_ones_code(error: type[StageError]) -> None:
    found = [Failure(7, "b", "later", 1), Failure(3, "a", "bad", error.exit_code)]
    refuse_failures(found, None)
    refuse_failures(found, 2)
    with refusal(error, "2 row(s) failed, more than --max_failures 1; the first: bad"):
        refuse_failures(found, 1)


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
    file = write_rows(tmp_path / "a.yaml", [config])
    prompts = write_rows(tmp_path / "a.jsonl", mixed_rows(1))
    result = subprocess.run(
        [sys.executable, TOOL, prompts, "--config", file, "--output_dir", tmp_path / "x"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and said in result.stderr
