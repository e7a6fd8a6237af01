"""A file of ours written row by row, for runs whose data is larger than memory should hold."""

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.files.artifacts import HEADER_KEY, Row, check_finite, hash_tensors, make_header
from common.files.recipe import Recipe
from common.whole_files import replace_whole

if TYPE_CHECKING:
    import torch

NO_HASH = "0" * 64  # stands for one that is not known yet, as long
_NAME_OF_DTYPE = {  # of what stages write
    **{"float32": "F32", "float16": "F16", "bfloat16": "BF16"},
    **{"uint8": "U8", "int32": "I32", "int64": "I64", "bool": "BOOL"},
}


class TensorWriter:
    """A file of ours that is written row by row, so that memory never holds it.

    Each tensor's rows go where they belong as they come; the header, whose length is known before,
    is written last. The layout is that of safetensors
    (https://github.com/huggingface/safetensors#format).
    """

    def __init__(
        self, path: Path, recipe: Recipe, provenance: dict[str, Any], rows: Sequence[Row]
    ) -> None:
        """
        Args:
            path: of the file, which `written_in_parts` puts in place.
            rows: of every tensor; their hashes are put in as the rows come.
        """
        self.path, self.count, self.written = path, len(rows), 0
        self._rows = [row._replace(data_sha256=NO_HASH) for row in rows]
        self._waiting: dict[str, list[int]] = {}  # the rows of each ending, the next one last
        for number in reversed(range(len(rows))):
            self._waiting.setdefault(rows[number].ending, []).append(number)
        self._counts = {ending: len(own) for ending, own in self._waiting.items()}
        self.shapes: dict[str, list[int]] = {}
        self._recipe, self._provenance = recipe, provenance
        self._begins: dict[str, int] = {}
        self._entries: dict[str, Any] = {}

    def open(self, temporary: Path) -> None:
        """Begin to write, to that place."""
        self._temporary = temporary
        self._file = temporary.open("w+b")

    def lay_out(self, samples: "Mapping[str, Mapping[str, torch.Tensor]]") -> None:
        """Settle where all tensors go, by a row [1, …] of each ending; before rows are put."""
        end = 0
        whole = {
            f"{name}{ending}": (tensor, self._counts[ending])
            for ending, tensors in samples.items()
            for name, tensor in tensors.items()
        }
        for key in sorted(whole):
            tensor, count = whole[key]
            begin, end = end, end + tensor[0].nbytes * count
            self.shapes[key] = [count, *tensor.shape[1:]]
            self._entries[key] = {
                "dtype": _NAME_OF_DTYPE[str(tensor.dtype).removeprefix("torch.")],
                "shape": self.shapes[key],
                "data_offsets": [begin, end],
            }
        self._written_header = make_header(self._recipe, self._provenance, NO_HASH)
        start = len(self._head(NO_HASH))
        self._begins = {key: start + each["data_offsets"][0] for key, each in self._entries.items()}

    def put(self, rows: "Mapping[str, torch.Tensor]", ending: str = "") -> None:
        """Write the next rows of an ending, [N, …] each.

        Raises:
            NotFiniteError: a row holds an infinity or a not-a-number.
        """
        import torch

        check_finite(rows, self.path, "was not written")
        waiting = self._waiting[ending]
        done = self._counts[ending] - len(waiting)
        for name, tensor in rows.items():
            data = tensor.contiguous().flatten().view(torch.uint8).numpy().data
            size = data.nbytes // len(tensor)
            self._file.seek(self._begins[f"{name}{ending}"] + done * size)
            self._file.write(data)
        for row in range(len(tensor)):
            data_sha256 = hash_tensors({name: each[row : row + 1] for name, each in rows.items()})
            number = waiting.pop()
            self._rows[number] = self._rows[number]._replace(data_sha256=data_sha256)
            self.written += 1

    def close(self) -> None:
        """Write the header: all rows are there."""
        assert self.written == self.count
        self._file.flush()
        digest = hashlib.sha256()
        self._file.seek(min(self._begins.values()))
        while block := self._file.read(1 << 20):  # tensors stand in the order of their keys
            digest.update(block)
        self._file.seek(0)
        self._file.write(self._head(digest.hexdigest()))
        self._file.close()

    def _head(self, data_sha256: str) -> bytes:
        """What stands before the data, as long whatever the hash is."""
        known = {"data_sha256": data_sha256, "rows": self._rows}
        header = self._written_header.model_copy(update=known)
        content = {"__metadata__": {HEADER_KEY: header.to_json()}, **self._entries}
        text = json.dumps(content, ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)  # data are aligned
        return struct.pack("<Q", len(text)) + text


@contextmanager
def written_in_parts(
    path: Path,
    recipe: Recipe,
    provenance: dict[str, Any],
    rows: Sequence[Row],
) -> Iterator[TensorWriter]:
    """A file that appears whole at the block's end, or not at all.

    Args:
        rows: of every tensor; their hashes are put in as the rows come.
    """
    writer = TensorWriter(path, recipe, provenance, rows)
    with replace_whole(path) as temporary:
        writer.open(temporary)
        yield writer
        writer.close()
