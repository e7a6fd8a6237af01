"""Progress is used by a run that is the same in all that matters, and by no other."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import UnfitEnvironmentError
from common.files import kept_progress
from common.files.kept_progress import Making, Progress, progress_paths, remove_progress
from tests.files.test_artifacts import make_recipe
from tests.refusals import LATENTS, refusal, zeros

FACTS = {"fingerprint": "abc", "batch_size": 8}

TENSORS = {
    "latents": torch.arange(8, dtype=torch.bfloat16).reshape(2, 4).T,  # not contiguous
    "step": torch.tensor(3),
}


def same(found: dict[str, torch.Tensor] | None, expected: dict[str, torch.Tensor]) -> bool:
    return (
        found is not None
        and found.keys() == expected.keys()
        and all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        and all(found[name].dtype == tensor.dtype for name, tensor in expected.items())
    )


def test_what_is_kept_reads_back_in_another_process_of_the_same_run(tmp_path: Path) -> None:
    progress = Progress(tmp_path, 2, FACTS)
    progress.save_steps(1, TENSORS)
    again = Progress(tmp_path, 2, dict(reversed(FACTS.items())))
    assert same(again.read_steps(1), TENSORS)
    assert again.read_steps(0) is None
    again.save_group(1, TENSORS)
    assert same(progress.read_group(1), TENSORS)
    assert progress.read_group(0) is None
    assert progress.read_steps(1) is None, "a finished group has no steps any more"


@pytest.mark.parametrize(
    ("stage", "facts"),
    [(2, FACTS | {"fingerprint": "abd"}), (2, FACTS | {"mesh": None}), (3, FACTS)],
)
def test_another_run_does_not_go_on_from_it(
    tmp_path: Path, stage: int, facts: dict[str, object]
) -> None:
    progress = Progress(tmp_path, 2, FACTS)
    progress.save_group(0, TENSORS)
    progress.save_steps(1, TENSORS)
    other = Progress(tmp_path, stage, facts)
    assert other.read_group(0) is None and other.read_steps(1) is None


def test_what_keeps_progress_from_being_used_is_said(tmp_path: Path) -> None:
    made = make_recipe(seed=1)
    assert Progress(tmp_path, 2, FACTS, made).why_unused() is None  # there is none
    Progress(tmp_path, 2, FACTS, made).save_group(3, TENSORS)
    assert Progress(tmp_path, 2, FACTS, made).why_unused() is None
    changed = FACTS | {"fingerprint": "abd"}
    assert Progress(tmp_path, 2, changed, make_recipe(seed=2)).why_unused() == "seed 1 → 2"
    assert Progress(tmp_path, 2, FACTS | {"batch_size": 2}, made).why_unused() == "batch_size 8 → 2"
    newer = made.model_copy(update={"versions": {"torch": "2"}})
    Progress(tmp_path, 2, changed, newer).save_steps(4, TENSORS)
    assert Progress(tmp_path, 2, FACTS, made).why_unused() == "torch 2 → 1"
    folder, _ = progress_paths(tmp_path, 2)
    (folder / kept_progress.MADE_BY_FILE).write_bytes(b"damaged")
    assert Progress(tmp_path, 2, FACTS | {"batch_size": 2}, made).why_unused() is None


def test_rows_are_kept_by_their_fingerprints(tmp_path: Path) -> None:
    """Whatever else the run makes now; a group that is damaged, or made in another way, is not."""
    earlier, later = make_recipe(seed=1), make_recipe(seed=2)
    progress = Progress(tmp_path, 2, FACTS, earlier)
    first, second = Making(1.5, {"mesh": "single"}), Making(None, {})
    path = progress.save_group(["a", "b"], TENSORS, **first._asdict())
    other = progress.save_group(["a", "c"], TENSORS, **second._asdict())  # begins with the same
    progress.save_steps(["d", "e"], TENSORS)
    again = Progress(tmp_path, 2, FACTS, later)
    found = again.find_rows()
    assert {"a", "b", "c"} == found.keys()
    assert found["b"] == (path, 1, first) and found["c"] == (other, 1, second)
    assert same(again.read_steps(["d", "e"]), TENSORS) and again.read_steps(["d"]) is None
    # What has none of the rows that are wanted is of other settings, which are said.
    for wanted in (["x", "c"], ["x", "e"]):
        assert again.why_unused(wanted) is None
    assert again.why_unused(["x", "y"]) == "seed 1 → 2"
    assert not Progress(tmp_path, 2, FACTS | {"batch_size": 2}, later).find_rows()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert again.find_rows().keys() == {"a", "c"}


def test_what_is_damaged_or_strange_is_not_used(tmp_path: Path) -> None:
    progress = Progress(tmp_path, 2, FACTS)
    progress.save_steps(0, TENSORS)
    _, file = progress_paths(tmp_path, 2)
    content = file.read_bytes()
    for position in range(0, len(content), 11):
        damaged = bytearray(content)
        damaged[position] ^= 0x04
        file.write_bytes(bytes(damaged))
        assert progress.read_steps(0) is None
    file.write_bytes(content[:-1])
    assert progress.read_steps(0) is None
    file.write_bytes(content)
    assert same(progress.read_steps(0), TENSORS)
    tensors = load_file(file)
    for metadata in (None, {kept_progress.KEY: "no JSON"}, {kept_progress.KEY: "{}"}):
        save_file(tensors, file, metadata=metadata)
        assert progress.read_steps(0) is None


def test_it_is_due_when_the_seconds_have_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(kept_progress.time, "monotonic", lambda: now[0])
    progress = Progress(tmp_path, 2, FACTS)
    assert not progress.is_due()
    now[0] += kept_progress.SECONDS_BETWEEN_SAVES
    assert progress.is_due()
    progress.save_steps(0, TENSORS)
    assert not progress.is_due()


def test_nothing_is_left_when_the_output_is_written(tmp_path: Path) -> None:
    for stage in (2, 3):
        progress = Progress(tmp_path, stage, FACTS)
        progress.save_group(0, TENSORS)
        progress.save_steps(1, TENSORS)
    remove_progress(tmp_path, 2)
    folder, _ = progress_paths(tmp_path, 3)
    assert kept_progress.MADE_BY_FILE in {path.name for path in folder.iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == {
        "stage3_progress",
        "stage3_progress.safetensors",
    }
    remove_progress(tmp_path, 3)
    remove_progress(tmp_path, 3)  # there is nothing any more
    assert not list(tmp_path.iterdir())


def test_progress_that_cannot_be_kept(tmp_path: Path) -> None:
    (tmp_path / "stage2_progress").write_text("")
    with refusal(UnfitEnvironmentError, "stage2_progress", "cannot be written", "--output_dir"):
        Progress(tmp_path, 2, {}).save_group(0, zeros(LATENTS))
