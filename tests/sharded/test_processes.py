"""Two processes of four devices each compute together, and only the first one writes."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from common.files.stage_table import LATENTS_FILE
from tests.conftest import STAGES, Run, file_contents, xla_flags
from tests.in_process import pixel_difference, relative_difference

FLAGS = {2: ("--mesh", "data=2,cfg=2,rows=2"), 3: ("--mesh", "data=2,rows=4")}


@pytest.fixture(scope="module")
def two_folders(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The run of one process without its latents and pictures, once for each process."""
    folders = [tmp_path_factory.mktemp(f"process{i}") / "run" for i in range(2)]
    for folder in folders:
        shutil.copytree(finished_run, folder)
    return folders


def run_together(stage: int, folders: list[Path]) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {"XLA_FLAGS": xla_flags(4)}
    processes = [
        subprocess.Popen(
            [
                *(sys.executable, STAGES[stage], "--output_dir", folder, *FLAGS[stage]),
                *("--distributed", f"{address},2,{index}"),
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index, folder in enumerate(folders)
    ]
    results = [process.communicate(timeout=300) for process in processes]
    for process, (_, errors) in zip(processes, results, strict=True):
        assert process.returncode == 0, errors
    assert f"wrote {folders[0]}" in results[0][0]
    assert "wrote" not in results[1][0] and "the first process writes" in results[1][0]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_two_processes_equal_one(stage: int, finished_run: Path, two_folders: list[Path]) -> None:
    for folder in two_folders:
        for path in [folder / LATENTS_FILE] if stage == 2 else folder.glob("*.png"):
            path.unlink()
    before = file_contents(two_folders[1])
    run_together(stage, two_folders)
    assert file_contents(two_folders[1]) == before
    if stage == 2:
        latents, expected = (
            load_file(folder / LATENTS_FILE)["latents"] for folder in (two_folders[0], finished_run)
        )
        assert relative_difference(latents, expected) < 1e-4
        shutil.copy(two_folders[0] / LATENTS_FILE, two_folders[1] / LATENTS_FILE)
    else:
        names = sorted(path.name for path in finished_run.glob("*.png"))
        assert len(names) == 3
        for name in names:
            pictures = [np.asarray(Image.open(f / name)) for f in (two_folders[0], finished_run)]
            assert pixel_difference(*pictures) <= 1


@pytest.mark.parametrize("value", ["localhost", "localhost:1,2,2", "localhost:1,0,0", "a:b,1,0"])
def test_a_misspelt_cluster_is_one_sentence(stage: Run, run_copy: Path, value: str) -> None:
    result = stage(2, "--output_dir", run_copy, "--distributed", value)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: --distributed {value} is not understood")
