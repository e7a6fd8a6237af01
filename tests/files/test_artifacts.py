"""Files of tensors: what is saved is loaded, and every kind of damage is found and named."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from common.errors import BadInputFileError, NotFiniteError, StageError, UnfitEnvironmentError
from common.files import artifacts
from common.files.artifacts import Recipe
from common.stopping import STOP_SIGNALS, StoppedError
from common.whole_files import replace_whole

TENSORS = {
    "b": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "a": torch.tensor([1.5, -2.25], dtype=torch.bfloat16),
}


def make_recipe(**settings: object) -> Recipe:
    return Recipe(
        stage=1, settings=settings, inputs={}, weights={"w": "1"}, versions={"torch": "1"}
    )


def saved(tmp_path: Path) -> Path:
    path = tmp_path / artifacts.EMBEDDINGS_FILE
    artifacts.save_tensors(path, TENSORS, make_recipe(seed=42), {"model_id": "m"})
    return path


def test_saved_tensors_load_as_the_same_bits(tmp_path: Path) -> None:
    artifact = artifacts.inspect(saved(tmp_path))
    loaded = artifacts.load_tensors(artifact, lambda text: pytest.fail(text))
    assert loaded.keys() == TENSORS.keys()
    for key, tensor in TENSORS.items():
        assert loaded[key].dtype == tensor.dtype
        assert torch.equal(loaded[key], tensor)
    assert artifact.header is not None
    assert artifact.header.recipe == make_recipe(seed=42)
    assert artifact.tensors["b"] == artifacts.TensorLayout("F32", (2, 3))


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
    assert header["recipe"]["settings"] == {"seed": 42}
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
    path = tmp_path / artifacts.LATENTS_FILE
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(BadInputFileError, match="longer than the file"):
        artifacts.inspect(path)


def test_an_altered_recipe_is_found(tmp_path: Path) -> None:
    path = saved(tmp_path)
    path.write_bytes(path.read_bytes().replace(b'seed\\": 42', b'seed\\": 43'))
    with pytest.raises(BadInputFileError, match="altered"):
        artifacts.inspect(path)


def test_a_strangers_file_passes_with_a_warning(tmp_path: Path) -> None:
    path = tmp_path / artifacts.EMBEDDINGS_FILE
    save_file({"b": TENSORS["b"]}, path, metadata={"dtype_info": "{}"})
    artifact = artifacts.inspect(path)
    warnings: list[str] = []
    loaded = artifacts.load_tensors(artifact, warnings.append)
    assert torch.equal(loaded["b"], TENSORS["b"])
    assert len(warnings) == 1 and "cannot be verified" in warnings[0]


def test_values_that_are_not_finite_are_neither_written_nor_read(tmp_path: Path) -> None:
    path = tmp_path / artifacts.LATENTS_FILE
    bad = {"latents": torch.tensor([1.0, float("nan")])}
    with pytest.raises(NotFiniteError, match="1 of 2 values of 'latents'"):
        artifacts.save_tensors(path, bad, make_recipe(), {})
    assert list(tmp_path.iterdir()) == []
    save_file(bad, path)
    with pytest.raises(NotFiniteError):
        artifacts.load_tensors(artifacts.inspect(path), lambda _: None)


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replace_whole(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_an_environment_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UnfitEnvironmentError, match="--output_dir"),
        replace_whole(tmp_path / "file" / "below") as temporary,
    ):
        temporary.write_text("")


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


def test_errors_have_the_documented_exit_codes() -> None:
    codes = {error.__name__: error.exit_code for error in StageError.__subclasses__()}
    assert codes == {
        "BadSettingError": 2,
        "BadInputFileError": 3,
        "NotFiniteError": 4,
        "UnfitEnvironmentError": 5,
        "StoppedError": 1,
    }
    assert [StoppedError(number, "").exit_code for number in STOP_SIGNALS] == [130, 143]
