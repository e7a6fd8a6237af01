"""Files of tensors: what is saved is loaded, and every kind of damage is found and named."""

import json
import math
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from common.errors import BadInputFileError, NotFiniteError
from common.files import artifacts, row_reader
from common.files.artifacts import HEADER_KEY, Row, make_header
from common.files.recipe import Recipe
from common.files.stage_table import EMBEDDINGS_FILE, LATENTS_FILE
from tests.conftest import Run, file_contents
from tests.refusals import DEEP, EMBEDDINGS, LATENTS, Shapes, expect, refusal, zeros

TENSORS = {
    "b": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "a": torch.tensor([1.5, -2.25], dtype=torch.bfloat16),
}


def make_recipe(**settings: object) -> Recipe:
    return Recipe(
        stage=1,
        settings={"embeddings": settings},
        inputs={},
        weights={"w": "1"},
        versions={"torch": "1"},
    )


def saved(tmp_path: Path) -> Path:
    path = tmp_path / EMBEDDINGS_FILE
    artifacts.save_tensors(path, TENSORS, make_recipe(seed=42), {"model_id": "m"})
    return path


def test_saved_tensors_load_as_the_same_bits(tmp_path: Path) -> None:
    artifact = artifacts.inspect(saved(tmp_path))
    loaded = row_reader.load_tensors(artifact, lambda text: pytest.fail(text))
    assert loaded.keys() == TENSORS.keys()
    for key, tensor in TENSORS.items():
        assert loaded[key].dtype == tensor.dtype
        assert torch.equal(loaded[key], tensor)
    assert artifact.header is not None
    assert artifact.header.recipe == make_recipe(seed=42)
    assert artifact.tensors["b"] == artifacts.TensorLayout("F32", (2, 3))


def test_rows_that_a_file_does_not_hold(tmp_path: Path) -> None:
    """What a header says of rows is beside what its checksum covers."""
    path = tmp_path / LATENTS_FILE
    two = {"latents": torch.ones(2, 4)}
    for rows in (["", "", ""], [""], ["_8x8", "_8x8"], ["", "_8x8"], ["s", "s"]):
        own = [Row("", "", ending=ending) for ending in rows]
        header = make_header(make_recipe(), {}, artifacts.hash_tensors(two), own)
        artifacts.save_whole(path, two, {HEADER_KEY: header.to_json()})
        with refusal(BadInputFileError, f"{path} is damaged: its header names other rows"):
            artifacts.inspect(path)


def test_the_data_hash_is_that_of_the_bytes_in_key_order(tmp_path: Path) -> None:
    import hashlib

    expected = hashlib.sha256(
        TENSORS["a"].view(torch.int16).numpy().tobytes() + TENSORS["b"].numpy().tobytes()
    ).hexdigest()
    assert artifacts.inspect(saved(tmp_path)).data_sha256 == expected
    assert artifacts.hash_tensors(TENSORS) == expected


def test_the_header_is_one_json_string_that_safetensors_reads(tmp_path: Path) -> None:
    with safe_open(saved(tmp_path), "pt") as file:
        header = json.loads(file.metadata()[artifacts.HEADER_KEY])
    assert header["recipe"]["settings"] == {"embeddings": {"seed": 42}}
    assert header["provenance"]["model_id"] == "m"


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    path = saved(tmp_path)
    content = path.read_bytes()
    for position in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[position] ^= 0x10
        path.write_bytes(bytes(damaged))
        try:
            found = artifacts.inspect(path)
        except BadInputFileError:
            continue
        # A flip inside provenance (a name, a time) changes nothing that is verified, and one in
        # the key of our header makes it a stranger's file; tensors and recipe must be intact.
        assert found.header is None or found.header.recipe == make_recipe(seed=42)
        assert found.data_sha256 == artifacts.hash_tensors(TENSORS)


def test_truncated_missing_and_foreign_files_are_named(tmp_path: Path) -> None:
    path = saved(tmp_path)
    content = path.read_bytes()
    for damaged in (content[:-1], content[:20], content[:4], b"", content + b"x", b"PK" * 50):
        path.write_bytes(damaged)
        with pytest.raises(BadInputFileError, match=r"stage1_embeddings.*make it again: python"):
            artifacts.inspect(path)
    path.unlink()
    with pytest.raises(BadInputFileError, match="missing; make it: python stages/stage1"):
        artifacts.inspect(path)


def test_a_forged_header_length_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / LATENTS_FILE
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(BadInputFileError, match="longer than the file"):
        artifacts.inspect(path)


def test_an_altered_recipe_is_found(tmp_path: Path) -> None:
    path = saved(tmp_path)
    path.write_bytes(path.read_bytes().replace(b'seed\\": 42', b'seed\\": 43'))
    with pytest.raises(BadInputFileError, match="altered"):
        artifacts.inspect(path)


def test_a_strangers_file_passes_with_a_warning(tmp_path: Path) -> None:
    path = tmp_path / EMBEDDINGS_FILE
    save_file({"b": TENSORS["b"]}, path, metadata={"dtype_info": "{}"})
    artifact = artifacts.inspect(path)
    warnings: list[str] = []
    loaded = row_reader.load_tensors(artifact, warnings.append)
    assert torch.equal(loaded["b"], TENSORS["b"])
    assert len(warnings) == 1 and "cannot be verified" in warnings[0]


def test_values_that_are_not_finite_are_neither_written_nor_read(tmp_path: Path) -> None:
    path = tmp_path / LATENTS_FILE
    bad = {"latents": torch.tensor([1.0, float("nan")])}
    with pytest.raises(NotFiniteError, match="1 of 2 values of 'latents'"):
        artifacts.save_tensors(path, bad, make_recipe(), {})
    assert list(tmp_path.iterdir()) == []
    save_file(bad, path)
    with pytest.raises(NotFiniteError):
        row_reader.load_tensors(artifacts.inspect(path), lambda _: None)


def test_staleness_is_said_in_words(tmp_path: Path) -> None:
    path = saved(tmp_path)
    assert artifacts.why_stale(path, make_recipe(seed=42)) is None
    assert artifacts.why_stale(path, make_recipe(seed=43)) == "seed 42 → 43"
    other = make_recipe(seed=42).model_copy(update={"weights": {"w": "2"}})
    assert artifacts.why_stale(path, other) == "weights of w changed"
    path.write_bytes(path.read_bytes()[:-1])
    assert "damaged" in str(artifacts.why_stale(path, make_recipe(seed=42)))
    path.unlink()
    assert "not there" in str(artifacts.why_stale(path, make_recipe(seed=42)))


def write_layout(path: Path, entries: dict[str, Any], data: bytes) -> None:
    """Write a safetensors file by hand, also one that the library would not write."""
    header = json.dumps(entries).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def entry(dtype: str, shape: list[int], begin: int, end: float) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


ONE = {"latents": entry("F32", [1], 0, 4)}


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"a": entry("F32", [1], -12, 4)}, "its tensors lie outside its data"),
        ({"a": entry("F32", [1], 4, 0), **ONE}, "its tensors lie outside its data"),
        ({"latents": entry("F32", [1], 0, 8)}, "it has"),
        ({"latents": {"dtype": "F32"}}, "'shape'"),
        ({"latents": entry("F32", [1], 0, math.inf)}, "cannot convert float infinity"),
        ({"__metadata__": [1], **ONE}, "not a safetensors file"),
        ({"__metadata__": {artifacts.HEADER_KEY: "{}"}, **ONE},
         "its header cannot be read (recipe: Field required)"),
        ({"__metadata__": {artifacts.HEADER_KEY: "no JSON"}, **ONE},
         "its header cannot be read (Invalid JSON"),
        ({"latents": entry("F99", [1], 0, 4)}, "holds 'latents' as F99, which no stage reads"),
        ({"latents": entry("F32", [3], 0, 4)}, "it holds 4 bytes for 'latents', F32 of (3,)"),
        ({"latents": entry("F6_E2M3", [4], 0, 3), "b": entry("U8", [1], 3, 4)}, "F6_E2M3"),
        ({**ONE, "b": entry("F4", [0], 4, 4)}, "holds 'b' as F4, which no stage reads"),
    ],
)  # fmt: skip
def test_a_forged_file_of_tensors(tmp_path: Path, entries: dict[str, Any], words: str) -> None:
    """What our reader does not find, safetensors' does."""
    path = tmp_path / LATENTS_FILE
    write_layout(path, entries, b"data")
    with refusal(BadInputFileError, str(path), words, f"--output_dir {tmp_path}"):
        row_reader.load_tensors(artifacts.inspect(path), lambda _: None)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ((2**40).to_bytes(8, "little") + b"{}", "its header is longer than the file"),
        ((100_000).to_bytes(8, "little") + DEEP.encode(), "it is nested too deeply"),
        (b"1234", "requires a buffer of 8 bytes"),
        (b"", "requires a buffer of 8 bytes"),
    ],
)
def test_a_file_that_begins_like_no_safetensors(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / EMBEDDINGS_FILE
    path.write_bytes(content)
    with refusal(
        BadInputFileError, str(path), words, f"stage1_text_encoder.py --output_dir {tmp_path}"
    ):
        artifacts.inspect(path)


def test_a_file_that_is_cut_short_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process cuts it after its layout was read."""
    path = tmp_path / LATENTS_FILE
    save_file(zeros(LATENTS), path)
    read_layout = artifacts._read_layout

    def read_then_cut(path: Path) -> Any:
        layout = read_layout(path)
        os.truncate(path, path.stat().st_size - 1)
        return layout

    monkeypatch.setattr(artifacts, "_read_layout", read_then_cut)
    with refusal(BadInputFileError, f"{path} is cut short", "make it again: python stages/stage2"):
        artifacts.inspect(path)


@pytest.mark.parametrize(
    ("number", "name", "shapes"), [(2, EMBEDDINGS_FILE, EMBEDDINGS), (3, LATENTS_FILE, LATENTS)]
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_not_used(
    run_dir: Path, number: int, name: str, shapes: Shapes, value: float
) -> None:
    key = next(iter(shapes))
    tensors = zeros(shapes)
    tensors[key].view(-1)[0] = value
    save_file(tensors, run_dir / name)
    size = tensors[key].numel()
    path = run_dir / name
    with refusal(
        NotFiniteError, f"{path} cannot be used: 1 of {size} values of '{key}'", "--dtype float32"
    ):
        row_reader.load_tensors(artifacts.inspect(path), lambda _: None)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(bytes(content))


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, empty, Path.unlink])
@pytest.mark.parametrize(("number", "name"), [(2, EMBEDDINGS_FILE), (3, LATENTS_FILE)])
def test_a_damaged_or_missing_input_exits_3(
    run_copy: Path, quick_stage: Run, number: int, name: str, damage: Callable[[Path], None]
) -> None:
    damage(run_copy / name)
    before = file_contents(run_copy)
    expect(quick_stage(number, "--output_dir", run_copy), 3, name, f"stage{number - 1}_")
    assert file_contents(run_copy) == before


def test_latents_of_other_embeddings_exit_3(run_copy: Path, quick_stage: Run) -> None:
    """A new prompt was encoded, but not denoised: its old picture must not pass for it."""
    assert quick_stage(1, "--output_dir", run_copy, "--prompt", "a green ring").returncode == 0
    before = file_contents(run_copy)
    expect(
        quick_stage(3, "--output_dir", run_copy),
        3,
        LATENTS_FILE,
        EMBEDDINGS_FILE,
        "made from other data",
    )
    assert file_contents(run_copy) == before


@pytest.mark.slow
def test_no_verify_trusts_the_checksum_of_an_input(run_copy: Path, stage: Run) -> None:
    flip_a_bit(run_copy / LATENTS_FILE)
    expect(stage(3, "--output_dir", run_copy), 3, LATENTS_FILE, "checksum")
    result = stage(3, "--output_dir", run_copy, "--no_verify")
    assert result.returncode == 0, result.stderr


def test_a_file_of_an_older_version_is_refused_and_as_an_output_stale(tmp_path: Path) -> None:
    """Its header, as the first version wrote it: settings of all stages in one place."""
    recipe = {
        "format_version": 1,
        "stage": 1,
        "settings": {"seed": 42},
        "inputs": {},
        "weights": {},
        "versions": {},
    }
    header = {
        "recipe": recipe,
        "provenance": {},
        "data_sha256": artifacts.hash_tensors(TENSORS),
        "fingerprint": "0" * 64,
    }
    path = tmp_path / "stage1_embeddings.safetensors"
    save_file(TENSORS, path, metadata={artifacts.HEADER_KEY: json.dumps(header)})
    with pytest.raises(BadInputFileError) as caught:
        artifacts.inspect(path)
    assert str(caught.value) == (
        f"{path} was made by an older version of this program; make it again: python "
        f"stages/stage1_text_encoder.py --output_dir {tmp_path}"
    )
    stale = artifacts.why_stale(path, make_recipe(seed=42))
    assert stale == "stage1_embeddings.safetensors is of an older format"
    recipe["format_version"] = 3
    save_file(TENSORS, path, metadata={artifacts.HEADER_KEY: json.dumps(header)})
    with pytest.raises(BadInputFileError, match="made by a newer version of this program"):
        artifacts.inspect(path)
