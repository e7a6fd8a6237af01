"""The report page in a real browser: pictures, labels, no requests, narrow and wide."""

import base64
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from common.files.artifacts import HEADER_KEY
from common.runs.sweep import Cell, Sweep, write_sweep
from tests.browsers import needs_chromium
from tests.conftest import PROJECT_DIR, Run, run_script
from tests.refusals import expect
from tools.report_page import MOST_INSIDE, view_run, write_page

REPORT_PAGE = PROJECT_DIR / "tools" / "report_page.py"
HOSTILE = """<script>alert('x')</script> "quoted" & <b>bold</b> {{ 7 * 7 }} </title>"""


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, run_all: Run) -> Path:
    """A sweep of a hostile prompt, whose cells are two runs and a failed one."""
    folder = tmp_path_factory.mktemp("swept")
    cells = []
    run = folder / "sweep" / "num_inference_steps=1"
    flags = ("--prompt", HOSTILE, "--num_inference_steps", 1, "--save_trajectory", 1)
    flags += ("--num_images_per_prompt", 2)
    result = run_all("--output_dir", run, *flags)
    assert result.returncode == 0, result.stderr
    shutil.copytree(run, folder / "sweep" / "num_inference_steps=2")
    for steps in (1, 2):
        name = f"sweep/num_inference_steps={steps}"
        values = {"num_inference_steps": str(steps)}
        cells.append(Cell(values=values, folder=name, sources=[name, name], exit_code=0))
    values = {"num_inference_steps": "3"}
    failed = Cell(values=values, folder="sweep/x", sources=[".", "."], exit_code=4, error=HOSTILE)
    axes = {"num_inference_steps": ["1", "2", "3"]}
    write_sweep(folder, Sweep(axes=axes, cells=[*cells, failed]))
    return folder


@needs_chromium
@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_in_a_browser(swept: Path, browser: Any, width: int, scheme: str) -> None:
    page_file = write_page(swept / "report.html", [swept])
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    requests: list[str] = []
    said: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(dialog.message))
    page.goto(page_file.as_uri())

    # Nothing is asked of any network, and nothing went wrong.
    assert {url for url in requests if not url.startswith("data:")} == {page_file.as_uri()}
    assert said == []
    # All pictures are decoded: in the grid, in both runs, their strips and animations.
    images = "[...document.querySelectorAll('main img')]"
    assert page.evaluate(f"{images}.length") == 4 + 4 + 4
    assert page.evaluate(f"{images}.every(i => i.complete && i.naturalWidth > 0)")
    # It fits: only what scrolls by itself may be wider.
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    small = "[...document.querySelectorAll('a, button')].filter(e => e.checkVisibility())"
    assert page.evaluate(f"{small}.every(e => e.getBoundingClientRect().height >= 24)")
    # The prompt is text.
    assert page.locator("figcaption", has_text=HOSTILE).count() == 4
    assert page.locator("b").count() == 0 and page.locator("script").count() == 1
    assert f"failed: {HOSTILE}" in page.locator(".grid .failed").inner_text()
    # The grid's axes have labels.
    labels = page.locator(".grid th").all_inner_texts()
    assert labels == ["num_inference_steps", "", "1", "2", "3"]
    # Paper and ink follow the scheme.
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")

    # By keyboard: enlarge, go on, close; the focus stays with the picture.
    page.locator("button.picture").first.focus()
    page.keyboard.press("Enter")
    large = page.locator("dialog img")
    assert large.is_visible()
    first = large.get_attribute("src")
    page.keyboard.press("ArrowRight")
    assert large.get_attribute("src") != first
    page.keyboard.press("ArrowLeft")
    assert large.get_attribute("src") == first
    page.keyboard.press("Escape")
    assert not large.is_visible()
    assert page.evaluate("document.activeElement.className") == "picture"
    assert said == []
    page.close()


def test_the_page_holds_its_runs_without_private_parts(swept: Path) -> None:
    page = write_page(swept / "report.html", [swept]).read_text(encoding="utf-8")
    assert "<script>alert" not in page and HOSTILE not in page
    assert "&lt;script&gt;alert" in page and "{{ 7 * 7 }}" in page
    assert HEADER_KEY not in page  # pictures are there without their metadata
    assert "http:" not in page.replace("http-equiv", "") and "https:" not in page


def test_prompts_and_seeds_become_a_grid(finished_run: Path, tmp_path: Path) -> None:
    page = write_page(tmp_path / "page.html", [finished_run]).read_text(encoding="utf-8")
    assert '<th class="axis" scope="col">seed</th>' in page
    assert '<th scope="row">42</th>' in page and '<th scope="row">43</th>' in page
    report = json.loads((finished_run / "stage2_report.json").read_text())
    assert f"{report['wall_seconds']:.2f} s by {report['backend']} on cpu" in page


def test_pictures_stand_beside_what_they_begin_with(
    finished_run: Path, tmp_path: Path, quick_stage: Run
) -> None:
    """Two pictures with their masks, and two results of each."""
    pixels = [np.full((128, 128, 3), value, np.uint8) for value in (60, 180)]
    masks = [np.zeros((128, 128), np.uint8) for _ in pixels]
    masks[0][:64], masks[1][:, :64] = 255, 255
    flags: list[object] = ["--num_inference_steps", 2, "--num_images_per_prompt", 2]
    for number, pair in enumerate(zip(pixels, masks, strict=True)):
        for name, array in zip(("image", "mask_image"), pair, strict=True):
            path = tmp_path / f"{name}{number}.png"
            Image.fromarray(array).save(path)
            flags += [f"--{name}", path]
    run = tmp_path / "run"
    names = ["--name_template", "{seed}", "--seed", 9]  # 10.png comes before 9.png, not after
    for stage, given in ((1, [*flags, *names]), (0, []), (2, []), (3, [])):
        result = quick_stage(stage, "--output_dir", run, *given)
        assert result.returncode == 0, result.stderr
    view = view_run(run)
    assert [len(group.pictures) for group in view.groups] == [2, 2]
    assert [p.settings["seed"] for p in view.pictures] == [9, 10, 11, 12]
    for group, *arrays in zip(view.groups, pixels, masks, strict=True):
        assert [each.caption for each in group.inputs] == ["what it begins with", "its mask"]
        for shown, array in zip(group.inputs, arrays, strict=True):
            with Image.open(io.BytesIO(base64.b64decode(shown.source.partition(",")[2]))) as image:
                found = np.asarray(image.convert("L")).astype(int)
            expected = array if array.ndim == 2 else array[..., 0]
            assert np.abs(found - expected).mean() < 3  # WebP's
    page = write_page(tmp_path / "page.html", [run]).read_text(encoding="utf-8")
    assert page.count("<figcaption>its mask</figcaption>") == 2
    assert quick_stage(1, "--output_dir", run, "--prompt", "a red star").returncode == 0
    assert all(not group.inputs for group in view_run(run).groups)  # it begins with none now


def test_no_run_directory_is_one_sentence(tmp_path: Path) -> None:
    expect(run_script(REPORT_PAGE, tmp_path / "nothing"), 3, "nothing is no folder")


def test_a_page_of_a_folder_without_a_run_is_not_made(tmp_path: Path) -> None:
    result = run_script(REPORT_PAGE, tmp_path)
    assert result.returncode == 3 and "holds no run" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory, finished_run: Path) -> Path:
    """A run of more pictures than a page holds, copies of one run's."""
    folder = tmp_path_factory.mktemp("large")
    for name in ("generation_config.json", "stage3_report.json"):
        shutil.copy(finished_run / name, folder / name)
    for number in range(MOST_INSIDE + 100):
        shutil.copy(
            finished_run / f"output_image_{number % 2:04d}.png",
            folder / f"output_image_{number:04d}.png",
        )
    return folder


def test_many_pictures_are_small_ones_beside_the_page(large: Path) -> None:
    small = large / "report_pictures"
    small.mkdir()
    (small / "holiday.webp").write_bytes(b"")
    (small / f"{'0' * 20}.webp").write_bytes(b"of an earlier page")
    text = write_page(large / "report.html", [large]).read_text(encoding="utf-8")
    count = MOST_INSIDE + 100
    assert text.count('loading="lazy"') == count and "data:image" not in text
    assert len(text) < 600 * count + 40_000
    sources = {*re.findall(r'src="(report_pictures/[^"]+)"', text)}
    assert {path.name for path in small.iterdir()} == {
        "holiday.webp",
        *(Path(source).name for source in sources),
    }
    with Image.open(large / min(sources)) as image:
        assert max(image.size) <= 256


@needs_chromium
def test_a_large_page_opens(large: Path, browser: Any) -> None:
    page = browser.new_page(viewport={"width": 1440, "height": 900})
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.goto(write_page(large / "report.html", [large]).as_uri())
    first = page.locator("button.picture img").first
    assert first.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0
    first.click()
    shown = page.locator("dialog img")
    assert shown.is_visible() and shown.get_attribute("alt") == first.get_attribute("alt")
    assert said == []
    page.close()
