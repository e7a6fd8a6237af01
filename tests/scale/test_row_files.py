"""Rows of files: each is found from anywhere, and one that cannot be read ends no others."""

import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from common.errors import BadInputFileError, BadSettingError
from common.scale.row_files import Row, find_files, read_rows
from tests.refusals import refusal

ROWS = [{"prompt": f"a {k}", "seed": k} for k in range(2500)]


def write(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def test_each_row_is_found_from_its_place(tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist(ROWS)
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=700)
    lines = b"\xef\xbb\xbf" + b"\n\r\n".join(json.dumps(row).encode() for row in ROWS)
    cells = b"Prompt, seed\n" + b"".join(b'"a\n%d",%d\r\n' % (k, k) for k in range(2500))
    for file, expected in (
        (str(tmp_path / "a.parquet"), ROWS),
        (write(tmp_path / "a.jsonl", lines), ROWS),
        (
            write(tmp_path / "a.csv", cells),
            [{"prompt": f"a\n{k}", "seed": str(k)} for k in range(2500)],
        ),
    ):
        found = list(read_rows(file))
        assert [row.values for row in found] == expected
        for place in (0, 1, 699, 700, 1400, 2499):
            assert list(read_rows(file, found[place].at, found[place].number)) == found[place:]


def test_a_row_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    lines = [b'{"prompt": "\xff"}', b"{", b"3", b'{"prompt": 1, "prompt": 2}', b'{"prompt": "b"}']
    found = list(read_rows(write(tmp_path / "a.jsonl", b"\n".join(lines))))
    said = ("is not UTF-8 text", "is not a JSON object", "it is another value", "stands twice")
    for row, words in zip(found, said, strict=False):
        assert row.error is not None and words in row.error
    assert found[-1] == Row(5, sum(len(line) + 1 for line in lines[:-1]), {"prompt": "b"})
    table = b'prompt,seed\n"a",1\n\xff,2\n"b"c,3\nd,4,5\n,\ne,\n'
    found = list(read_rows(write(tmp_path / "a.csv", table)))
    assert [row.number for row in found] == [2, 3, 4, 5, 7]
    assert [row.values for row in found if row.error is None] == [
        {"prompt": "a", "seed": "1"},
        {"prompt": "e"},
    ]
    said = ("is not UTF-8 text", "is not CSV", "has 3 cells under a header of 2")
    for row, words in zip(found[1:4], said, strict=True):
        assert row.error is not None and words in row.error


def test_nulls_say_nothing(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "seed": None, "loras": ["x.safetensors:0.5"]}, {"prompt": "b"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = [row.values for row in read_rows(str(tmp_path / "a.parquet"))]
    assert found == [{"prompt": "a", "loras": ["x.safetensors:0.5"]}, {"prompt": "b"}]


def test_files_of_a_folder_stand_by_name(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.CSV", "notes.txt", "c/d.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = [Path(file).name for file in find_files(str(tmp_path))]
    assert found == ["a.CSV", "b.jsonl", "d.parquet"]
    assert find_files(str(tmp_path / "b.jsonl")) == [f"file://{tmp_path}/b.jsonl"]


def test_what_is_no_list_is_refused(tmp_path: Path) -> None:
    with refusal(BadInputFileError, "does not exist"):
        find_files(str(tmp_path / "none.jsonl"))
    with refusal(BadSettingError, "give a file of .jsonl"):
        find_files(write(tmp_path / "a.txt", b"a prompt"))
    with refusal(BadInputFileError, "cannot be read"):
        find_files("nosuch://bucket/a.jsonl")
    with refusal(BadInputFileError, "cannot be read"):
        list(read_rows(write(tmp_path / "a.parquet", b"PAR1")))
    with refusal(BadSettingError, "names no column `prompt`"):
        list(read_rows(write(tmp_path / "a.csv", b"text\nx\n")))
    with pytest.raises(BadSettingError):
        list(read_rows(write(tmp_path / "b.csv", b"")))
