"""Pictures with their settings inside, each made once, wherever it stands in a run."""

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from common.compute.clock import StageReport
from common.declared import EMBEDDINGS, LATENTS, PICTURES
from common.files import artifacts
from common.files.artifacts import Artifact
from common.files.kept_progress import Progress, remove_progress
from common.files.picture_files import read_picture_record
from common.files.recipe import Recipe
from common.files.stage_table import LATENTS_FILE
from common.runs.pictures import (
    Found,
    PictureFacts,
    Pictures,
    PictureWriter,
    picture_settings,
    web_ui_text,
    why_pictures_stale,
)
from common.stopping import StoppedError, StopRequest
from common.vae.grids import make_grid
from tests.configs import make_config
from tests.conftest import DEMO
from tests.refusals import refusal

OF_EMBEDDINGS = {
    "prompts": ["a red star", "a ring"],
    "prompts_2": [None, "a blue ring"],
    "negative_prompts": ["blurry", None],
    "negative_prompts_2": [None, None],
}
OF_LATENTS = {
    "num_images_per_prompt": 2,
    "seeds": [1, 2, 3, 4],
    "num_inference_steps": 25,
    "scheduler": "EulerAncestralDiscreteScheduler",
    "scheduler_options": {},
    "height": 16,
    "width": 24,
}
OF_PICTURES = {"vae_dtype": "float32", "tile": False}
PIXELS = np.random.default_rng(0).integers(0, 256, (4, 16, 24, 3), np.uint8)


class Run:
    """A run directory with latents, whose pictures are what the test says."""

    def __init__(
        self, folder: Path, embeddings: dict[str, Any], latents: dict[str, Any], **config: Any
    ) -> None:
        self.folder = folder
        upstream = {EMBEDDINGS: OF_EMBEDDINGS | embeddings, LATENTS: OF_LATENTS | latents}
        made = Recipe(stage=2, settings=upstream, inputs={}, weights={}, versions={})
        seeds = upstream[LATENTS]["seeds"]
        tensor = torch.tensor(seeds, dtype=torch.float32)[:, None, None, None].repeat(1, 4, 2, 3)
        path, said = folder / LATENTS_FILE, {"model_id": "models/demo"}
        artifacts.save_tensors(path, {"latents": tensor}, made, said, [str(s) for s in seeds])
        self.latents: Artifact = artifacts.inspect(path)
        self.config = make_config(DEMO, **config)
        own = OF_PICTURES | {"image_format": self.config.image_format}
        self.recipe = made.model_copy(
            update={
                "stage": 3,
                "settings": {**upstream, PICTURES: own},
                "inputs": {LATENTS_FILE: self.latents.data_sha256},
            }
        )
        self.pictures = Pictures.of(self.config, self.recipe, self.latents, None)

    def writer(self, *overrides: str) -> PictureWriter:
        header = self.latents.header
        facts = PictureFacts(config=self.config, header=header, overrides=[*overrides])
        return PictureWriter(self.folder, self.pictures, facts, StageReport(3))

    def why_stale(self) -> str | None:
        return why_pictures_stale(Found(self.folder), self.pictures, None)

    def names(self) -> list[str]:
        return sorted(p.name for p in self.folder.iterdir() if p.name != LATENTS_FILE)


def write_all(run: Run, *overrides: str, pixels: np.ndarray = PIXELS) -> Path:
    writer = run.writer(*overrides)
    writer.put(range(len(run.pictures.rows)), pixels)
    return writer.finish()


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_a_picture_has_its_own_prompt_and_seed(tmp_path: Path) -> None:
    run = Run(tmp_path, {}, {})
    header = run.latents.header
    settings = picture_settings(run.pictures.rows[3], header)
    assert (settings["prompt"], settings["prompt_2"]) == ("a ring", "a blue ring")
    assert (settings["negative_prompt"], settings["seed"]) == (None, 4)
    assert (settings["num_images_per_prompt"], settings["model_id"]) == (1, "models/demo")
    assert not settings.keys() & {"prompts", "seeds"}
    shared = picture_settings(run.pictures.grid_recipe, header)
    assert not shared.keys() & {"prompt", "prompts", "seed", "seeds"}
    assert shared["num_inference_steps"] == 25
    assert picture_settings(run.recipe, None) == {}  # latents from elsewhere


def test_web_uis_know_the_sampler_by_their_own_name(tmp_path: Path) -> None:
    run = Run(tmp_path, {}, {})
    settings = picture_settings(run.pictures.rows[0], run.latents.header)
    lines = web_ui_text(settings).splitlines()
    assert lines[:2] == ["a red star", "Negative prompt: blurry"]
    assert "Sampler: Euler a" in lines[2] and "Steps: 25" in lines[2] and "Size: 24x16" in lines[2]


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
    main = write_all(run, "vae None → elsewhere", pixels=PIXELS[:images])
    assert "removed 1 picture(s) that an earlier run made: output_image_0007.webp" in (
        capsys.readouterr().out
    )
    several = [f"output_image_{index:04d}.png" for index in range(images)]
    names = ["output_image.png"] if images == 1 else several
    assert main.name == (names[0] if images == 1 else "output_grid.png")
    assert run.names() == sorted({"holiday.png", *names, main.name})
    for index, name in enumerate(names):
        record = read_picture_record(tmp_path / name)
        assert record is not None and record["overrides"] == ["vae None → elsewhere"]
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
    writer.take_all(Found(tmp_path))
    assert "2 of 4 to make: 2 changed (negative_prompt, seed)" in capsys.readouterr().out
    assert writer.taken == {0, 1} and writer.missing == [2, 3]
    new = 255 - PIXELS[2:]
    writer.put([2, 3], new)
    writer.finish()
    remove_progress(tmp_path, 3)
    for index, pixels in enumerate([PIXELS[1], PIXELS[0], *new]):
        np.testing.assert_array_equal(read(tmp_path / f"output_image_{index:04d}.png"), pixels)
    assert run.why_stale() is None
    assert not [name for name in run.names() if not name.startswith("output_")]


def test_a_taken_picture_survives_a_kill_between_two_names(tmp_path: Path) -> None:
    """It stands aside under its fingerprint before another one gets its name."""
    write_all(Run(tmp_path, {}, {}))
    run = Run(tmp_path, {}, {"seeds": [2, 1, 4, 3]})
    run.writer().take_all(Found(tmp_path))
    for name in run.pictures.names[:2]:
        (tmp_path / name).unlink()
    writer = run.writer()
    writer.take_all(Found(tmp_path))
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


def test_why_pictures_are_stale_is_told_of_the_first(tmp_path: Path) -> None:
    run = Run(tmp_path, {}, {})
    assert run.why_stale() == "output_image_0000.png is not there"
    write_all(run)
    (tmp_path / "output_image_0002.png").write_bytes(b"")
    assert run.why_stale() == "output_image_0002.png is damaged or not of ours"
