"""The files that stages exchange: what each holds, its header, and how it is saved and verified.

A header is one JSON string under one key of a file's metadata. It records what determined the
content (`recipe`), where it came from (`provenance`), and two hashes: `data_sha256` of the tensor
bytes in key order, and `fingerprint` of the recipe. A file is fresh when its fingerprint is the one
that the present settings, inputs and weights give.
"""

import hashlib
import math
import os
import re
import struct
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from common.errors import BadInputFileError, NotFiniteError, first_refusal
from common.files.recipe import (
    Recipe,
    age_of_format,
    difference,
    refuse_other_format,
    to_json,
)
from common.files.run_files import MAKERS, how_to_remake
from common.text_files import parse_json
from common.whole_files import replace_whole

if TYPE_CHECKING:
    import torch


HEADER_KEY = "staged_diffusion"
MADE_BY = "made_by"  # of a header's provenance: a list, of which rows name one each

# Ours hold the prompts; a forged one of this size takes less than a GB as Python's objects.
MOST_HEADER_BYTES = 16_000_000

BYTES_OF_DTYPE = {
    **{"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2},
    **{"I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1},
}


class Row(NamedTuple):
    """What a file says of one of its rows."""

    fingerprint: str  # of the recipe of a run of this row alone
    data_sha256: str  # as the file of such a run has it
    seconds: float | None = None  # of devices, that it took
    made_by: int | None = None  # which of the file's `made_by`: options that its bits depend on
    ending: str = ""  # of its tensors' names, in a file whose rows are of several sizes


class Header(BaseModel):
    """What a file of ours says of itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: list[Row] = []  # none where a file is not of rows
    recipe: Recipe
    provenance: dict[str, Any]
    data_sha256: str
    fingerprint: str

    def to_json(self) -> str:
        return to_json(self.model_dump())

    def made_by(self, row: int) -> dict[str, Any]:
        """The options that a row's bits depend on, as they were settled; none are known of some."""
        known = self.provenance.get(MADE_BY, [])
        index = self.rows[row].made_by if row < len(self.rows) else None
        found = known[index] if index is not None and index < len(known) else {}
        return dict(found) if isinstance(found, dict) else {}

    @classmethod
    def from_json(cls, text: str, path: Path) -> "Header":
        """Parse a header and check that its fingerprint is that of its recipe.

        Raises:
            BadInputFileError: it is not a header of this format.
        """
        refuse_other_format(path, _format_of(text), how_to_remake(path))
        try:
            header = cls.model_validate_json(text)
        except ValidationError as error:
            raise BadInputFileError(
                f"{path}: its header cannot be read ({first_refusal(error)}); {how_to_remake(path)}"
            ) from None
        if header.fingerprint != header.recipe.fingerprint():
            raise BadInputFileError(
                f"{path}: its header was altered (the fingerprint does not fit the settings it "
                f"records); {how_to_remake(path)}"
            )
        return header


def _format_of(header: str) -> Any:
    """The format that a header names; None where it names none."""
    try:
        return parse_json(header)["recipe"]["format_version"]
    except (ValueError, LookupError, TypeError):
        return None


@dataclass(frozen=True)
class TensorLayout:
    """A tensor's dtype, as safetensors names it (F32, BF16, …), and shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A whole and undamaged file, not yet loaded. `header` is None for a file from elsewhere."""

    path: Path
    header: Header | None
    data_sha256: str
    tensors: dict[str, TensorLayout]


# --- writing ------------------------------------------------------------------------------------


def save_tensors(
    path: Path,
    tensors: "Mapping[str, torch.Tensor]",
    recipe: Recipe,
    provenance: dict[str, Any],
    rows: Sequence[str] = (),
) -> Header:
    """Save tensors with their header as safetensors, whole or not at all.

    Args:
        rows: the fingerprints of the tensors' rows, where these have some.

    Raises:
        NotFiniteError: a tensor holds an infinity or a not-a-number; nothing is written.
    """
    check_finite(tensors, path, "was not written")
    contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
    known = []
    for k, fingerprint in enumerate(rows):
        own = {key: each[k : k + 1] for key, each in contiguous.items()}
        known.append(Row(fingerprint, hash_tensors(own)))
    header = make_header(recipe, provenance, hash_tensors(contiguous), known)
    save_whole(path, contiguous, {HEADER_KEY: header.to_json()})
    return header


def save_whole(path: Path, tensors: "dict[str, torch.Tensor]", metadata: Mapping[str, str]) -> None:
    """Save contiguous tensors as safetensors, whole or not at all, without a copy in memory.

    Raises:
        UnfitEnvironmentError: the folder cannot be written, or the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with replace_whole(path) as temporary:
        try:
            save_file(tensors, temporary, metadata=dict(metadata))
        except SafetensorError as error:  # which has the system's error in its text alone
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from None


def make_header(
    recipe: Recipe, provenance: dict[str, Any], data_sha256: str, rows: Sequence[Row] = ()
) -> Header:
    """Complete a header with the fingerprint and the time."""
    return Header(
        recipe=recipe,
        provenance=provenance | {"written_at": time.strftime("%Y-%m-%dT%H:%M:%S%z")},
        data_sha256=data_sha256,
        fingerprint=recipe.fingerprint(),
        rows=[*rows],
    )


# --- reading ------------------------------------------------------------------------------------


def inspect(path: Path, *, verify: bool = True) -> Artifact:
    """Read a file's header and layout and verify its checksum, without loading torch.

    Args:
        verify: False trusts the checksum in the header; one without a header is always computed.

    Raises:
        BadInputFileError: the file is missing, is not whole, or its data or header is damaged.
    """
    layout = _read_layout(path)
    text = layout.metadata.get(HEADER_KEY)
    header = None if text is None else Header.from_json(text, path)
    if header is not None and not verify:
        data_sha256 = header.data_sha256
    else:
        data_sha256 = _hash_data(path, layout)
    if header is not None and header.data_sha256 != data_sha256:
        raise BadInputFileError(
            f"{path} is damaged: its data has the checksum {data_sha256[:12]}…, its header says "
            f"{header.data_sha256[:12]}…; {how_to_remake(path)}"
        )
    if header is not None and header.rows and _are_odd(header.rows, layout.tensors):
        raise BadInputFileError(
            f"{path} is damaged: its header names other rows than it holds; {how_to_remake(path)}"
        )
    return Artifact(path=path, header=header, data_sha256=data_sha256, tensors=layout.tensors)


def _are_odd(rows: Sequence[Row], tensors: Mapping[str, TensorLayout]) -> bool:
    """Whether rows are not those of the tensors whose names end as they say."""
    counts = Counter(row.ending for row in rows)
    if any(not re.fullmatch(r"_\d{1,5}x\d{1,5}", ending) for ending in counts if ending):
        return True
    found = {
        ending: {t.shape[:1] for n, t in tensors.items() if n.endswith(ending)} for ending in counts
    }
    return any(found[ending] != {(count,)} for ending, count in counts.items())


def _hash_data(path: Path, layout: "_Layout") -> str:
    """sha256 over the tensor bytes of a safetensors file in key order."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for key in sorted(layout.tensors):
            begin, end = layout.offsets[key]
            file.seek(begin)
            remaining = end - begin
            while remaining:
                block = file.read(min(remaining, 1 << 20))
                if not block:
                    raise BadInputFileError(f"{path} is cut short; {how_to_remake(path)}")
                digest.update(block)
                remaining -= len(block)
    return digest.hexdigest()


def hash_tensors(tensors: "Mapping[str, torch.Tensor]") -> str:
    """The same hash of tensors in memory."""
    import torch

    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(tensors[key].contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def refuse_misfit(artifact: Artifact, misfit: str | None) -> None:
    """Raise where a file does not hold what is needed; `misfit` ends a sentence on the file."""
    if misfit is not None:
        raise BadInputFileError(f"{artifact.path} {misfit}; {how_to_remake(artifact.path)}")


def inputs_misfit(artifact: Artifact) -> str | None:
    """Compare what a file says it was made from with the files that stand beside it.

    Returns:
        What is wrong, as the end of a sentence that begins with the file's name; None where all
        agrees, or an input is not there any more.
    """
    made_from = artifact.header.recipe.inputs if artifact.header is not None else {}
    for name, data_sha256 in made_from.items():
        if name not in MAKERS:
            return f"says that it was made from {name!r}, which no stage makes"
        try:
            found = inspect(artifact.path.with_name(name), verify=False)
        except BadInputFileError:
            continue
        if found.data_sha256 != data_sha256:
            return (
                f"was made from other data (checksum {data_sha256[:12]}…) than {found.path} holds "
                f"({found.data_sha256[:12]}…)"
            )
    return None


def check_finite(tensors: "Mapping[str, torch.Tensor]", path: Path, consequence: str) -> None:
    """Raise `NotFiniteError` where a tensor holds an infinity or a not-a-number."""
    for key, tensor in tensors.items():
        # In parts: what is asked of all at once takes half as much memory again.
        parts = tensor.flatten().split(1 << 22)
        bad = sum(part.numel() - int(part.isfinite().sum()) for part in parts)
        if bad:
            raise NotFiniteError(
                f"{path} {consequence}: {bad} of {tensor.numel()} values of {key!r} are not "
                "finite; try float32 (--dtype float32), less guidance or another scheduler"
            )


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """What stands before the data of a safetensors file."""

    metadata: dict[str, str]
    tensors: dict[str, TensorLayout]
    offsets: dict[str, tuple[int, int]]  # key → where its bytes begin and end in the file


def _read_layout(path: Path) -> _Layout:
    """Read a safetensors file's layout and check that the file is whole."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(MOST_HEADER_BYTES, size - 8):
                raise ValueError("its header is longer than the file, or than any of ours")
            entries = parse_json(file.read(length))
        metadata = entries.pop("__metadata__", {})
        start = 8 + length
        layout = _Layout(
            metadata=dict(metadata),
            tensors={
                key: TensorLayout(str(entry["dtype"]), tuple(map(int, entry["shape"])))
                for key, entry in entries.items()
            },
            offsets={
                key: (start + int(entry["data_offsets"][0]), start + int(entry["data_offsets"][1]))
                for key, entry in entries.items()
            },
        )
        end = max((end for _, end in layout.offsets.values()), default=start)
        if end != size:
            raise ValueError(f"it has {size} bytes in place of {end}")
        for key, (begin, end) in layout.offsets.items():
            dtype, shape = layout.tensors[key].dtype, layout.tensors[key].shape
            if not start <= begin <= end or min(shape, default=0) < 0:
                raise ValueError("its tensors lie outside its data")
            if dtype not in BYTES_OF_DTYPE:
                raise ValueError(f"it holds {key!r} as {dtype}, which no stage reads")
            if end - begin != math.prod(shape) * BYTES_OF_DTYPE[dtype]:
                raise ValueError(f"it holds {end - begin} bytes for {key!r}, {dtype} of {shape}")
    except FileNotFoundError:
        maker = MAKERS.get(path.name)
        mend = f"; make it: {maker} --output_dir {path.parent}" if maker else ""
        raise BadInputFileError(f"{path} is missing{mend}") from None
    except (
        *(OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError),
        struct.error,
    ) as error:
        raise BadInputFileError(
            f"{path} is damaged or not a safetensors file ({error}); {how_to_remake(path)}"
        ) from None
    return layout


# --- freshness ----------------------------------------------------------------------------------


def why_stale(path: Path, expected: Recipe, *, verify: bool = True) -> str | None:
    """Say why a safetensors file must be made anew, or None where it is fresh."""
    if not path.exists():
        return f"{path.name} is not there"
    try:
        header = inspect(path, verify=verify).header
    except BadInputFileError:
        age = _age_of(path)
        return f"{path.name} is damaged" if age is None else f"{path.name} is of {age} format"
    if header is None:
        return f"{path.name} has no header of ours"
    return difference(header.recipe, expected)


def _age_of(path: Path) -> str | None:
    """Whether another version of this program made a file, as "an older" or "a newer"."""
    try:
        return age_of_format(_format_of(_read_layout(path).metadata.get(HEADER_KEY, "")))
    except BadInputFileError:
        return None
