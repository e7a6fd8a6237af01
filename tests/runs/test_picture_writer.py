"""Pictures, each made once, wherever it stands in a run."""

import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import BadSettingError
from common.files.kept_progress import Progress, remove_progress
from common.files.picture_files import read_picture_record
from common.runs.pictures import (
    Found,
)
from common.runs.run_index import read_index
from common.stopping import StoppedError, StopRequest
from common.vae.grids import make_grid
from tests.refusals import refusal
from tests.runs.picture_run import OF_EMBEDDINGS, PIXELS, Run, read, write_all


def test_what_a_jpeg_does_not_hold_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = {"prompts": ["a red star, " * 9000, "a ring"]}
    write_all(Run(tmp_path, prompts, {}, image_format="jpg"))
    said = "a JPEG's metadata hold 64 kB: prompt shortened in the pictures; the whole is in stage3"
    assert said in capsys.readouterr().err
    first = read_picture_record(tmp_path / "output_image_0000.jpg")
    assert first is not None and first["settings"]["prompt"].endswith("…")
    last = read_picture_record(tmp_path / "output_image_0003.jpg")
    assert last is not None and last["settings"]["prompt"] == "a ring" and "shortened" not in last


@pytest.mark.parametrize("images", [1, 2])
def test_pictures_take_the_place_of_another_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], images: int
) -> None:
    (tmp_path / "output_image_0007.webp").write_bytes(b"")
    (tmp_path / "holiday.png").write_bytes(b"")
    prompts = {name: values[:1] for name, values in OF_EMBEDDINGS.items()}
    seeds = {"seeds": [1, 2][:images], "num_images_per_prompt": images}
    run = Run(tmp_path, prompts, seeds, vae="elsewhere")
    main = write_all(run, {"vae": [None, "elsewhere"]}, pixels=PIXELS[:images])
    assert "removed 1 picture(s) that an earlier run made: output_image_0007.webp" in (
        capsys.readouterr().out
    )
    several = [f"output_image_{index:04d}.png" for index in range(images)]
    names = ["output_image.png"] if images == 1 else several
    assert main.name == (names[0] if images == 1 else "output_grid.png")
    assert run.names() == sorted({"holiday.png", "images.jsonl", *names, main.name})
    for index, name in enumerate(names):
        record = read_picture_record(tmp_path / name)
        assert record is not None and record["overrides"] == {"vae": [None, "elsewhere"]}
        assert record["fingerprint"] == run.pictures.rows[index].fingerprint()
        assert (record["settings"]["seed"], record["settings"]["vae"]) == (index + 1, "elsewhere")
        assert np.array_equal(read(tmp_path / name), PIXELS[index])
    assert run.why_stale() is None


def test_grids_are_of_the_pictures_in_pages(tmp_path: Path) -> None:
    run = Run(tmp_path, {}, {}, grid_images=3)
    assert write_all(run).name == "output_grid_0000.png"
    for page, rows in enumerate((PIXELS[:3], PIXELS[3:])):
        np.testing.assert_array_equal(
            read(tmp_path / f"output_grid_{page:04d}.png"), make_grid(rows)
        )
    assert run.why_stale() is None
    other = Run(tmp_path, {}, {}, grid_images=2)
    assert other.why_stale() == "output_grid_0000.png was made with other settings"
    assert Run(tmp_path, {}, {}, grid_images=0).why_stale() is None


def test_pictures_are_taken_wherever_they_stand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two changed places, one is new, one is gone; what a name held before is not lost."""
    write_all(Run(tmp_path, {}, {}))
    run = Run(
        tmp_path,
        {"negative_prompts": ["blurry", "dull"]},
        {"seeds": [2, 1, 3, 9]},
    )
    assert run.why_stale() == "output_image_0000.png was made with other settings"
    writer = run.writer()
    writer.take_all(Found(tmp_path), set())
    assert "2 of 4 to make: 2 changed (negative_prompt, seed)" in capsys.readouterr().out
    assert writer.taken == {0, 1} and writer.missing == [2, 3]
    new = 255 - PIXELS[2:]
    writer.put([2, 3], new)
    writer.finish()
    remove_progress(tmp_path, 3)
    for index, pixels in enumerate([PIXELS[1], PIXELS[0], *new]):
        np.testing.assert_array_equal(read(tmp_path / f"output_image_{index:04d}.png"), pixels)
    assert run.why_stale() is None
    assert run.names()[0] == "images.jsonl"
    assert all(name.startswith("output_") for name in run.names()[1:])
    seeds = [(line["file"], line["seed"]) for line in read_index(tmp_path)]
    assert seeds == [*zip(run.pictures.names, [2, 1, 3, 9], strict=True)]


def test_a_taken_picture_survives_a_kill_between_two_names(tmp_path: Path) -> None:
    """It stands aside under its fingerprint before another one gets its name."""
    write_all(Run(tmp_path, {}, {}))
    run = Run(tmp_path, {}, {"seeds": [2, 1, 4, 3]})
    run.writer().take_all(Found(tmp_path), set())
    for name in run.pictures.names[:2]:
        (tmp_path / name).unlink()
    writer = run.writer()
    writer.take_all(Found(tmp_path), set())
    assert writer.missing == []
    for name, pixels in zip(run.pictures.names, PIXELS[[1, 0, 3, 2]], strict=True):
        np.testing.assert_array_equal(read(tmp_path / name), pixels)


def test_a_decoding_that_is_stopped_goes_on_after_its_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where all are to be made: what an earlier run made is not among those that are taken."""
    run, stop = Run(tmp_path, {}, {}), StopRequest()
    write_all(run)
    stop.number = signal.SIGTERM
    progress = Progress(tmp_path, 3, {"fingerprint": "of this run"})
    with refusal(
        StoppedError, "terminated after 2 of 4 images, which are kept", "the same command goes on"
    ):
        run.writer().put([0, 1], PIXELS[:2], progress, stop)
    for facts, taken in (("of this run", {0, 1}), ("of another", set())):
        writer = run.writer()
        writer.take_done(Found(tmp_path), Progress(tmp_path, 3, {"fingerprint": facts}))
        assert writer.taken == taken
    assert capsys.readouterr().out.count("goes on after 2 of 4 images") == 1
    (tmp_path / run.pictures.names[0]).write_bytes(b"damaged")
    writer = run.writer()
    writer.take_done(Found(tmp_path), progress)
    assert writer.taken == {1}


def test_pictures_under_names_of_their_own(tmp_path: Path) -> None:
    """They are found by the index, and removed where they are of another run."""
    (tmp_path / "holiday.png").write_bytes(b"")
    first = Run(tmp_path, {}, {}, name_template="{seed}")
    write_all(first)
    assert {"1.png", "4.png"} < {*first.names()} and first.why_stale() is None
    (tmp_path / "images.jsonl").unlink()
    assert first.why_stale() == "images.jsonl is not there"
    writer = first.writer()
    writer.take_all(Found(tmp_path, first.pictures.names), set())
    assert writer.missing == []
    writer.finish()
    plain = Run(tmp_path, {}, {})
    writer = plain.writer()
    writer.take_all(Found(tmp_path), set())
    assert writer.missing == []
    writer.finish()
    remove_progress(tmp_path, 3)
    assert plain.why_stale() is None and "1.png" not in plain.names()
    assert (tmp_path / "holiday.png").exists()
    np.testing.assert_array_equal(read(tmp_path / "output_image_0002.png"), PIXELS[2])


def test_a_file_of_the_users_own_is_not_replaced(tmp_path: Path) -> None:
    run = Run(tmp_path, {}, {}, name_template="{seed}")
    Image.fromarray(PIXELS[0]).save(tmp_path / "3.png")
    with refusal(BadSettingError, f"{tmp_path / '3.png'} is there and no picture of ours"):
        run.why_stale()
    (tmp_path / "3.png").unlink()
    write_all(run)
    (tmp_path / "3.png").write_bytes(b"damaged")  # one of ours, by the index
    assert run.why_stale() == "3.png is damaged or not of ours"
