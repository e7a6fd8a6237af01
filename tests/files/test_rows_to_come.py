"""What another process keeps is read once, by rows of the file to come."""

from pathlib import Path

import pytest
import torch

from common.errors import BadInputFileError
from common.files import artifacts, rows_to_come
from common.files.kept_progress import Making, Progress
from common.files.rows import Rows
from common.files.rows_to_come import RowsToCome, announce
from common.files.run_lock import RunLock
from common.files.stage_table import DENOISE, LATENTS_FILE
from tests.files.test_artifacts import make_recipe
from tests.refusals import refusal

MAKING = Making(0.5, {"mesh": "single"})
ROWS = ["a", "b", "c", "b"]  # the second stands twice


def group(*values: float) -> dict[str, torch.Tensor]:
    rows = torch.tensor(values).reshape(-1, 1, 1, 1)
    return {"latents": rows, "trajectory": rows + 1}


def test_groups_come_once_with_the_rows_that_they_have(tmp_path: Path) -> None:
    progress, to_come = Progress(tmp_path, 2, {"mesh": None}), RowsToCome(tmp_path, DENOISE)
    lock = RunLock.of_stage(tmp_path, wait=False)
    lock.acquire()
    assert not to_come.look() and not list(to_come.new_groups("latents"))
    announce(
        progress, make_recipe(seed=1), {"model_id": "demo"}, Rows(recipes=[], fingerprints=ROWS)
    )
    assert to_come.look() and to_come.header is not None
    assert to_come.header.recipe == make_recipe(seed=1)
    assert to_come.header.provenance["model_id"] == "demo"

    progress.save_group(["c", "b"], group(3, 2), **MAKING._asdict())
    progress.save_group(["x"], group(9), **MAKING._asdict())  # of rows that are no longer wanted
    found, other = sorted(to_come.new_groups("latents"), key=lambda each: -len(each.rows))
    assert (found.rows, found.places, found.making) == ([2, 1, 3], [0, 1, 1], MAKING)
    assert found.tensors.keys() == {"latents"} and other.rows == []
    of_file = [artifacts.hash_tensors({"latents": group(value)["latents"]}) for value in (3, 2, 2)]
    assert found.data_sha256 == of_file
    to_come.note(2, MAKING)
    assert to_come.header.rows[2].seconds == 0.5
    assert to_come.header.made_by(2) == {"mesh": "single"} and to_come.header.made_by(0) == {}
    assert not list(to_come.new_groups("latents"))
    progress.save_group(["a"], group(1), **MAKING._asdict())
    assert [each.rows for each in to_come.new_groups("latents")] == [[0]]

    # Of a process that computes in another way, or that ran before, nothing is taken.
    other_way = Progress(tmp_path, 2, {"mesh": "data=2"})
    other_way.save_group(["a", "b"], group(1, 2), **MAKING._asdict())
    assert not list(to_come.new_groups("latents"))
    lock.release()
    assert not RowsToCome(tmp_path, DENOISE).look()


def test_a_file_that_does_not_come_is_missed(tmp_path: Path) -> None:
    progress, to_come = Progress(tmp_path, 2, {}), RowsToCome(tmp_path, DENOISE)
    to_come.refuse_unfinished()  # nothing was said
    lock = RunLock.of_stage(tmp_path, wait=False)
    lock.acquire()
    announce(progress, make_recipe(seed=1), {}, Rows(recipes=[], fingerprints=ROWS))
    assert to_come.look()
    path = tmp_path / LATENTS_FILE
    with refusal(BadInputFileError, f"stage 2 ended before {path} was written"):
        to_come.refuse_unfinished()
    artifacts.save_tensors(path, group(1), make_recipe(seed=2), {})
    with refusal(BadInputFileError, "stage 2 ended before"):
        to_come.refuse_unfinished()
    artifacts.save_tensors(path, group(1), make_recipe(seed=1), {})
    to_come.refuse_unfinished()
    lock.release()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"process": 1}'])
def test_what_cannot_be_read_says_nothing(tmp_path: Path, text: str) -> None:
    folder = tmp_path / "stage2_progress"
    folder.mkdir()
    (folder / rows_to_come.TO_COME_FILE).write_text(text)
    assert not RowsToCome(tmp_path, DENOISE).look()
