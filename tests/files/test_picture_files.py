"""Pictures carry their settings, and damage to them is seen."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.compute.groups import group_size, groups, prompt_indices
from common.files import picture_files
from common.vae.decoder import make_grid

SETTINGS = {
    "prompt": "a “red” star — 星",
    "negative_prompt": "blurry",
    "num_inference_steps": 25,
    "scheduler": "EulerDiscreteScheduler",
    "guidance_scale": 7.5,
    "seed": 42,
    "width": 24,
    "height": 16,
    "model_id": "models/demo",
}


def make_picture() -> tuple[np.ndarray, dict[str, object]]:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    record = {"settings": SETTINGS, "pixels_sha256": picture_files.hash_pixels(pixels)}
    return pixels, record


@pytest.mark.parametrize("ending", ["png", "webp", "jpg"])
def test_the_record_reads_back(tmp_path: Path, ending: str) -> None:
    pixels, record = make_picture()
    path = tmp_path / f"output_image.{ending}"
    path.write_bytes(picture_files.encode_picture(pixels, path.suffix, record))
    assert picture_files.read_picture_record(path) == record
    with Image.open(path) as image:
        if ending != "jpg":
            assert np.array_equal(np.asarray(image.convert("RGB")), pixels)


def test_png_has_the_parameters_that_web_uis_read(tmp_path: Path) -> None:
    pixels, record = make_picture()
    (tmp_path / "output_image.png").write_bytes(
        picture_files.encode_picture(pixels, ".png", record)
    )
    with Image.open(tmp_path / "output_image.png") as image:
        assert image.info["parameters"] == (
            "a “red” star — 星\nNegative prompt: blurry\nSteps: 25, "
            "Sampler: EulerDiscreteScheduler, CFG scale: 7.5, Seed: 42, Size: 24x16, "
            "Model: models/demo"
        )


@pytest.mark.parametrize("ending", ["png", "webp", "jpg"])
def test_a_damaged_picture_has_no_record(tmp_path: Path, ending: str) -> None:
    pixels, record = make_picture()
    path = tmp_path / f"output_image.{ending}"
    path.write_bytes(picture_files.encode_picture(pixels, path.suffix, record))
    path.write_bytes(path.read_bytes()[:200])
    assert picture_files.read_picture_record(path) is None
    path.write_bytes(b"")
    assert picture_files.read_picture_record(path) is None


def test_a_retouched_png_is_seen(tmp_path: Path) -> None:
    pixels, record = make_picture()
    path = tmp_path / "output_image.png"
    retouched = pixels.copy()
    retouched[3, 3, 0] ^= 1
    path.write_bytes(picture_files.encode_picture(retouched, path.suffix, record))
    assert picture_files.read_picture_record(path) is None


def test_only_our_pictures_are_removed(tmp_path: Path) -> None:
    ours = ["output_image.png", "output_image_0000.webp", "output_grid.jpg"]
    others = ["output_image_x.png", "holiday.png", "output_image.txt", "my_output_image.png"]
    for name in ours + others:
        (tmp_path / name).write_text("")
    picture_files.remove_others(tmp_path, {"output_grid.jpg"})
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*others, "output_grid.jpg"])


def test_the_grid_shows_every_picture_in_order() -> None:
    images = np.stack([np.full((2, 3, 3), value, np.uint8) for value in (10, 20, 30)])
    grid = make_grid(images)
    assert grid.shape == (4, 6, 3)
    assert (grid[:2, :3] == 10).all() and (grid[:2, 3:] == 20).all()
    assert (grid[2:, :3] == 30).all() and (grid[2:, 3:] == 255).all()


@pytest.mark.parametrize(
    ("images", "batch", "devices"), [(1, 8, 1), (7, 3, 1), (8, 8, 2), (3, 8, 4)]
)
def test_groups_cover_every_image_once(images: int, batch: int, devices: int) -> None:
    size = group_size(images, batch, devices)
    assert size % devices == 0
    seen: list[int] = []
    for chosen, real in groups(images, size):
        assert len(chosen) == size
        seen += chosen[:real].tolist()
    assert seen == list(range(images))


def test_images_are_prompt_major() -> None:
    assert prompt_indices(2, 3).tolist() == [0, 0, 0, 1, 1, 1]
