"""safetensors files that people download, and what lies in their place."""

import gzip
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from common.errors import BadInputFileError
from common.models.tensor_files import TensorHeader, read_header, read_tensors
from tests.refusals import refusal


def test_what_a_file_holds(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2, 3, dtype=torch.bfloat16), "b": torch.zeros(())}
    save_file(tensors, tmp_path / "f.safetensors", {"x": "y"})
    header = read_header(tmp_path / "f.safetensors", "--lora f")
    assert header.tensors == {"a": TensorHeader((2, 3), "BF16"), "b": TensorHeader((), "F32")}
    assert header.metadata == {"x": "y"}
    read = read_tensors(tmp_path / "f.safetensors", "--lora f")
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def _pickle(path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, path)


def _old_pickle(path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)


INSTEAD = {
    b"": "is empty: get it again",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 5\n": "is a Git LFS pointer",
    b"\n<!DOCTYPE html><html>": "is a web page: download the file itself",
    b"GGUF\x03\0\0\0": "is a GGUF file",
    gzip.compress(b"x" * 100, mtime=0): "is packed with gzip: unpack it",
    b"\xff" * 100: "is damaged or cut short",
}


@pytest.mark.parametrize("read", [read_header, read_tensors])
@pytest.mark.parametrize("content", [*INSTEAD, _pickle, _old_pickle])
def test_what_is_no_safetensors_file_is_told_as_what_it_is(
    tmp_path: Path, read: object, content: object
) -> None:
    path = tmp_path / "file.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
        words = INSTEAD[content]
    else:
        content(path)  # type: ignore[operator]
        words = "pickle, which can run code: get its safetensors version"
    with refusal(BadInputFileError, "--lora it is ", words):
        read(path, "--lora it")  # type: ignore[operator]
