"""What makes shards, and how it finds the rows that cannot be made."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.errors import UnfitEnvironmentError
from common.files.stage_table import FIRST, LAST
from common.scale.makers import Made, Making, hash_of, own_folder, write_list
from common.scale.shards import Failure, Line, Shard
from tests.refusals import refusal

LINES = [Line(row, f"a.jsonl, line {row + 1}", 1, f'{{"prompt": "é{row}"}}') for row in range(13)]
SHARD = Shard(0, 0, 13, 13, (), (), "", "ab" * 32)


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
