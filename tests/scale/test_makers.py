"""What makes shards, and how it finds the rows that cannot be made."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.errors import BadInputFileError, BadSettingError, UnfitEnvironmentError
from common.files.stage_table import FIRST, LAST
from common.scale.makers import Made, Making, hash_of, own_folder, sift, write_list
from common.scale.shards import Failure, Line, Shard
from tests.refusals import refusal

LINES = [Line(row, f"a.jsonl, line {row + 1}", 1, f'{{"prompt": "é{row}"}}') for row in range(13)]
SHARD = Shard(0, 0, 13, 13, (), (), "", "ab" * 32)


def do_without(
    bad: dict[int, Exception],
) -> tuple[Callable[[Sequence[Line]], list[int]], list[int]]:
    """Something that cannot be done with some rows, and how many rows each call had."""
    calls: list[int] = []

    def do(lines: Sequence[Line]) -> list[int]:
        calls.append(len(lines))
        for line in lines:
            if line.row in bad:
                raise bad[line.row]
        return [line.row for line in lines]

    return do, calls


def test_bad_rows_are_left_out_each_with_its_error() -> None:
    do, calls = do_without({0: BadSettingError("no 0"), 7: BadInputFileError("no 7")})
    lines, failures, done = sift(LINES, do)
    good = [line for line in LINES if line.row not in (0, 7)]
    assert lines == good and done == [line.row for line in good]
    assert failures == [
        Failure(0, "a.jsonl, line 1", "no 0", 2),
        Failure(7, "a.jsonl, line 8", "no 7", 3),
    ]
    assert len(calls) < 3 + 2 * 2 * 4
    assert sift(LINES, do_without({})[0]) == (LINES, [], list(range(13)))
    all_bad = {line.row: BadSettingError("no") for line in LINES}
    lines, failures, nothing = sift(LINES, do_without(all_bad)[0])
    assert lines == [] and nothing is None and len(failures) == 13


def test_rows_that_do_not_go_together_all_fail() -> None:
    def do(lines: Sequence[Line]) -> None:
        if len(lines) == len(LINES):
            raise BadSettingError("not together")

    lines, failures, _ = sift(LINES, do)
    assert lines == [] and {failure.error for failure in failures} == {"not together"}
    assert [failure.row for failure in failures] == list(range(13))


def test_what_passes_is_no_rows_fault() -> None:
    calls = []

    def do(lines: Sequence[Line]) -> int:
        calls.append(len(lines))
        if len(calls) == 1:
            raise BadInputFileError("not readable now")
        return len(lines)

    assert sift(LINES, do) == (LINES, [], 13)


def test_the_environment_is_no_rows_fault() -> None:
    do, _ = do_without({5: UnfitEnvironmentError("the disk is full")})
    with refusal(UnfitEnvironmentError, "the disk is full"):
        sift(LINES, do)


def test_a_shard_on_its_way_is_the_same_again() -> None:
    made = Made(SHARD, lines=LINES[:2], failures=[Failure(3, "x", "y", 4)], ids={1: "own", 2: None})
    made.files, made.seconds = {"a": b"\0"}, {"encode": 1.0}
    assert Made.from_row(made.to_row()) == made


def test_a_run_of_a_shard_has_flags_but_for_what_its_rows_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Making, "refuse_other_content", lambda _: None)
    making = Making(
        flags={
            "seed": 7,
            "seed_offset": 3,
            "num_images_per_prompt": 2,
            "height": 64,
            "mesh": "single",
        },
        target=str(tmp_path / "target"),
        folder=str(tmp_path),
    )
    assert making.settings().seed == 7 and making.settings().seed_offset == 3
    commands = making.commands(tmp_path)
    assert "--height=64" in commands[FIRST] and "--mesh=single" not in commands[FIRST]
    assert not [
        flag for own in commands.values() for flag in own if "seed" in flag or "num" in flag
    ]
    assert f"--prompts_file={tmp_path / 'prompts.jsonl'}" in commands[FIRST]
    assert f"--output_dir={tmp_path}" in commands[LAST] and "--grid_images=0" in commands[LAST]
    write_list(tmp_path, LINES[:2])
    assert (tmp_path / "prompts.jsonl").read_text("utf-8") == f"{LINES[0].text}\n{LINES[1].text}\n"
    monkeypatch.chdir("/")
    making.enter()
    assert Path.cwd() == tmp_path.resolve()


def test_what_pictures_are_made_of_is_the_same_everywhere(tmp_path: Path) -> None:
    making = Making(flags={}, target=str(tmp_path))
    here = hash_of(making.content_here())
    replace(making, content=here).refuse_other_content()
    with refusal(UnfitEnvironmentError, "has another checkpoint"):
        making.refuse_other_content()
    elsewhere = replace(making, content=here, flags={"model_id": str(tmp_path / "none")})
    with refusal(UnfitEnvironmentError, "on ", "neither an existing folder nor a hub id"):
        elsewhere.refuse_other_content()


def test_flags_that_are_called_otherwise_than_their_settings_count(tmp_path: Path) -> None:
    lora = tmp_path / "a.safetensors"
    given: dict[str, Any] = {
        "lora": [f"{lora}:0.5"],
        "scheduler_option": ["use_karras_sigmas=true"],
        "no_negative_prompt": True,
        "dtype": "bfloat16",
    }
    found = Making(flags=given, target="").settings()
    assert found.loras[0].file == str(lora) and found.loras[0].scale == 0.5
    assert found.scheduler_options == {"use_karras_sigmas": True}
    assert found.negative_prompt is None and found.text_encoder_dtype == "bfloat16"


def test_folders_of_processes_that_are_no_more_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with own_folder() as first:
        left = first.with_name(f"{2**22 + 1}-x")
        left.mkdir()
        with own_folder() as second:
            assert first.is_dir() and second.is_dir() and not left.exists()
    assert not first.exists() and not second.exists()
