"""Shards in their store: whole or not at all, on a disk and where there are objects alone."""

import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from PIL import Image
from pyarrow import parquet

from common.errors import BadInputFileError, StageError, UnfitEnvironmentError
from common.runs.run_index import write_index
from common.scale.planning import Format
from common.scale.row_files import find_files, read_rows
from common.scale.shard_store import ShardStore
from common.scale.shards import Failure
from tests.object_store import BUCKET, object_store
from tests.refusals import refusal

NAMES = [f"{row:09d}-{'ab'[row % 2] * 16}" for row in (0, 2)]
FAILURES = [Failure(1, "a.jsonl, line 2", "a.jsonl, line 2 is none", 2)]


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    with object_store() as variables:
        yield variables


@pytest.fixture(params=["disk", "objects"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "disk":
        return f"file://{tmp_path}/target"
    request.getfixturevalue("s3")
    return f"s3://{BUCKET}/{tmp_path.name}"


def make_run(folder: Path, rows: list[int]) -> Path:
    folder.mkdir(exist_ok=True)
    lines = []
    for row in rows:
        name = f"{row:09d}.png"
        Image.new("RGB", (8, 8), (row, 0, 0)).save(folder / name)
        lines.append({"file": name, "id": f"{row:09d}", "prompt": f"p{row}", "seed": 2**63 - 1})
        lines[-1] |= {"fingerprint": f"f{row}", "seconds": 0.5, "index": row}
    write_index(folder, lines)
    for name in (
        "stage3_report.json",
        "stage2_latents.safetensors",
        "stage1_embeddings.safetensors",
    ):
        (folder / name).write_text("{}")
    return folder


def read(target: str, place: str) -> bytes:
    with fsspec.open(f"{target}/{place}", "rb") as file:
        content: bytes = file.read()
    return content


def files_in(target: str) -> set[str]:
    system, root = fsspec.core.url_to_fs(target)
    system.invalidate_cache()
    return {path.removeprefix(f"{root}/") for path in system.find(root)}


@pytest.mark.parametrize("form", ["folder", "webdataset", "parquet"])
def test_pictures_are_found_by_the_index(target: str, tmp_path: Path, form: Format) -> None:
    store = ShardStore(target, form)
    assert store.done() == set()
    store.commit(NAMES[0], make_run(tmp_path / "a", [0]), 1, {0: "own"}, FAILURES)
    assert store.is_done(NAMES[0]) and not store.is_done(NAMES[1])
    assert store.failures(NAMES[:1]) == FAILURES
    store.commit(NAMES[1], make_run(tmp_path / "b", [2, 3]), 2, {}, [])
    assert store.done() == {*NAMES}
    assert store.finish(NAMES) == (3, 1)
    rows = parquet.read_table(io.BytesIO(read(target, "index.parquet"))).to_pylist()
    assert [(row["row"], row["id"], row["prompt"]) for row in rows] == [
        (0, "own", "p0"),
        (2, None, "p2"),
        (3, None, "p3"),
    ]
    assert rows[0]["seed"] == 2**63 - 1 and rows[0]["flagged"] is None and rows[0]["host"]
    for row in rows:
        place, _, member = row["file"].partition("#")
        content = read(target, place)
        if form == "webdataset":
            with tarfile.open(fileobj=io.BytesIO(content)) as tar:
                key = member.removesuffix(".png")
                found = {each.name: tar.extractfile(each) for each in tar.getmembers()}
                picture, told, text = (found[f"{key}.{e}"] for e in ("png", "json", "txt"))
                assert picture is not None and told is not None and text is not None
                content = picture.read()
                assert json.loads(told.read())["fingerprint"] == row["fingerprint"]
                assert text.read().decode() == row["prompt"]
        elif form == "parquet":
            (own,) = (
                each
                for each in parquet.read_table(io.BytesIO(content)).to_pylist()
                if each["file"] == row["file"]
            )
            content = own["picture"]
        with Image.open(io.BytesIO(content)) as image:
            assert image.convert("RGB").getpixel((0, 0)) == (row["row"], 0, 0)
    failed = parquet.read_table(io.BytesIO(read(target, "failed.parquet"))).to_pylist()
    assert failed == [FAILURES[0]._asdict()]


def test_latents_stay_where_they_are_wanted(target: str, tmp_path: Path) -> None:
    for latents in (False, True):
        store = ShardStore(target, latents=latents)
        store.finish([])
        store.commit(NAMES[0], make_run(tmp_path / "a", [0]), 1, {}, [])
        kept = {name.rpartition("/")[2] for name in files_in(target) if "shards" in name}
        assert ("stage2_latents.safetensors" in kept) == latents
        assert "stage3_report.json" in kept and "stage1_embeddings.safetensors" not in kept


def test_what_a_killed_process_left_is_no_shard(target: str, tmp_path: Path) -> None:
    store, run = ShardStore(target), make_run(tmp_path / "a", [0])
    system, root = fsspec.core.url_to_fs(target)
    # A folder without its index; half a folder; an earlier list's.
    for place in (f"shards/{NAMES[0]}/x.png", f"shards/.{NAMES[1]}.12345678.tmp/x.png"):
        system.makedirs(f"{root}/{place}".rpartition("/")[0], exist_ok=True)
        system.pipe_file(f"{root}/{place}", b"half")
    assert store.done() == set() and not store.is_done(NAMES[0])
    store.commit(f"{4:09d}-{'c' * 16}", run, 1, {}, [])
    for name in NAMES:
        store.commit(name, run, 1, {}, [])
        store.commit(name, run, 1, {}, [])  # once more: the same
    assert store.finish(NAMES) == (2, 0)
    found = files_in(target)
    assert {place.split("/")[1] for place in found if place.startswith("shards/")} == {*NAMES}
    assert {place.split("/")[1] for place in found if place.startswith("index/")} == {
        f"{name}.parquet" for name in NAMES
    }
    assert "failed.parquet" not in found and not [name for name in found if ".tmp" in name]
    if "://" not in target:  # objects of a killed process stay beside, as nobody renames them
        assert "x.png" not in {place.rpartition("/")[2] for place in found}


def test_a_shard_without_pictures_is_done_too(target: str) -> None:
    store = ShardStore(target)
    store.commit(NAMES[0], None, 0, {}, FAILURES)
    assert store.done() == {NAMES[0]} and store.finish(NAMES[:1]) == (0, 1)


def test_a_shard_that_lacks_pictures_is_none(target: str, tmp_path: Path) -> None:
    with refusal(StageError, "has 1 pictures of 2"):
        ShardStore(target).commit(NAMES[0], make_run(tmp_path / "a", [0]), 2, {}, [])
    assert ShardStore(target).done() == set()


def test_what_is_there_already_stays(tmp_path: Path) -> None:
    """Another attempt of a process that was taken for dead."""
    store = ShardStore(str(tmp_path / "target"))
    store.commit(NAMES[0], make_run(tmp_path / "a", [0]), 1, {}, [])
    picture = tmp_path / "target" / "shards" / NAMES[0] / "000000000.png"
    before = picture.stat().st_ino
    store.commit(NAMES[0], make_run(tmp_path / "a", [0]), 1, {}, [])
    assert picture.stat().st_ino == before


def test_an_attempt_that_is_slower_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, copy = ShardStore(str(tmp_path / "target")), shutil.copy2
    runs = [make_run(tmp_path / name, [0]) for name in "ab"]
    place = tmp_path / "target" / "shards" / NAMES[0]
    place.mkdir(parents=True)
    (place / "x.png").write_text("of a process that died")

    def copy_slowly(source: Path, to: Path) -> None:
        monkeypatch.setattr(shutil, "copy2", copy)
        store.commit(NAMES[0], runs[1], 1, {0: "faster"}, [])
        seen.append({path.name: path.stat().st_ino for path in place.iterdir()})
        copy(source, to)

    seen = list[dict[str, int]]()
    monkeypatch.setattr(shutil, "copy2", copy_slowly)
    store.commit(NAMES[0], runs[0], 1, {0: "slower"}, [])
    assert {path.name: path.stat().st_ino for path in place.iterdir()} == seen[0]
    assert "x.png" not in seen[0] and [path.name for path in place.parent.iterdir()] == [NAMES[0]]
    index = parquet.read_table(tmp_path / "target" / "index" / f"{NAMES[0]}.parquet")
    assert index["id"].to_pylist() == ["faster"]


def test_files_of_others_stay(target: str) -> None:
    system, root = fsspec.core.url_to_fs(target)
    for place in ("shards/mine/a.png", "index/notes.txt", "shards/000000001"):
        system.makedirs(f"{root}/{place}".rpartition("/")[0], exist_ok=True)
        system.pipe_file(f"{root}/{place}", b"mine")
    ShardStore(target).finish([])
    assert {"shards/mine/a.png", "index/notes.txt", "shards/000000001"} <= files_in(target)


def test_one_program_at_a_time(tmp_path: Path) -> None:
    store = ShardStore(str(tmp_path / "target"))
    with (
        store.lock(),
        refusal(UnfitEnvironmentError, "another program makes a list in"),
        ShardStore(str(tmp_path / "target")).lock(),
    ):
        pass
    with ShardStore("memory://x").lock():
        pass


def test_a_target_that_is_none(tmp_path: Path) -> None:
    with refusal(UnfitEnvironmentError, "--output_dir nosuch://x cannot be reached"):
        ShardStore("nosuch://x")
    (tmp_path / "file").write_text("")
    with refusal(UnfitEnvironmentError, "cannot be written", "choose another"):
        ShardStore(str(tmp_path / "file" / "x")).commit(NAMES[0], None, 0, {}, [])


def test_an_object_store_that_cannot_be_written_is_told_at_once(s3: dict[str, str]) -> None:
    with (
        refusal(UnfitEnvironmentError, "s3://none/x cannot be written", "bucket does not exist"),
        ShardStore("s3://none/x").lock(),
    ):
        pass
    with ShardStore(f"s3://{BUCKET}/x").lock():
        assert files_in(f"s3://{BUCKET}/x") == set()


def test_lists_of_an_object_store(s3: dict[str, str]) -> None:
    place = f"s3://{BUCKET}/lists"
    for name in ("b.csv", "a.jsonl", "notes.txt"):
        content = b"prompt\nb\n" if name == "b.csv" else b'{"prompt": "a"}\n'
        fsspec.filesystem("s3").pipe_file(f"{place}/{name}", content)
    files = find_files(place)
    assert files == [f"{place}/a.jsonl", f"{place}/b.csv"]
    assert [row.values["prompt"] for file in files for row in read_rows(file)] == ["a", "b"]
    with refusal(BadInputFileError, "s3://none/a.jsonl does not exist"):
        find_files("s3://none/a.jsonl")
