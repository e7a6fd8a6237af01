"""safetensors files that people download: what they hold, or what they are in its place."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import BadInputFileError

if TYPE_CHECKING:
    import torch

# What a file that is none begins with → what it is, and the mend.
_OTHERS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the file itself: git lfs pull gets it"),
    (b"<", "is a web page: download the file itself"),
    (b"PK\x03\x04", "is a PyTorch pickle, which can run code: get its safetensors version"),
    (b"\x80", "is a pickle, which can run code: get its safetensors version"),
    (b"GGUF", "is a GGUF file: get its safetensors version"),
    (b"\x1f\x8b", "is packed with gzip: unpack it"),
)


@dataclass(frozen=True)
class TensorHeader:
    """What a file says of a tensor before its values are read."""

    shape: tuple[int, ...]
    dtype: str  # in safetensors' words, such as F16


@dataclass(frozen=True)
class FileHeader:
    """What a safetensors file holds."""

    tensors: Mapping[str, TensorHeader]
    metadata: Mapping[str, str]


def read_header(path: Path, said: str) -> FileHeader:
    """What a file holds; its values are not read.

    Args:
        said: how messages name the file.

    Raises:
        BadInputFileError: it is damaged, or no safetensors file at all.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return FileHeader(
                {
                    name: TensorHeader(tuple(found.get_shape()), found.get_dtype())
                    for name, found in slices.items()
                },
                file.metadata() or {},
            )
    except (OSError, SafetensorError):
        raise BadInputFileError(f"{said} {_instead(path)}") from None


def read_tensors(path: Path, said: str) -> "dict[str, torch.Tensor]":
    """All tensors of a file. Raises as `read_header` does."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError):
        raise BadInputFileError(f"{said} {_instead(path)}") from None


def without_ones(shape: Sequence[int]) -> tuple[int, ...]:
    """A weight's shape; a convolution of size 1 and a linear layer are the same."""
    return tuple(shape[:2]) if all(size == 1 for size in shape[2:]) else tuple(shape)


def other_content(path: Path) -> str | None:
    """What a file is that is no safetensors file, as the end of a sentence; None: not known."""
    try:
        with path.open("rb") as file:
            begins = file.read(64)
    except OSError:
        return None
    if not begins:
        return "is empty: get it again"
    return next((said for start, said in _OTHERS if begins.lstrip().startswith(start)), None)


def _instead(path: Path) -> str:
    return other_content(path) or "is damaged or cut short: get it again"
