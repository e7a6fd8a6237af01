"""Ten thousand pictures in one run: the memory of each stage, and the page of them.

    python benchmarks/large_run.py
    python benchmarks/large_run.py --pictures 300 --beside 60

Pictures of 64×64 in one step, ten of each prompt. Memory is the most that a stage's process held,
beside that of a smaller run. The page is opened in Chromium, where that is installed. Ends with 1
where stages 2 or 3 took more than 1.3 times the smaller run's memory, or the page more than 3 s or
5 MB.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import typer

from common.files.report import read_report
from common.runs.run_index import read_index

PROJECT_DIR = Path(__file__).resolve().parent.parent
OF_EACH = 10  # pictures of a prompt
MOST_MEMORY, MOST_SECONDS, MOST_BYTES = 1.3, 3.0, 5_000_000
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def run(pictures: int, folder: Path) -> dict[int, float]:
    """Make so many pictures. Returns stage → the most memory that it held, in MB."""
    prompts = folder.with_suffix(".txt")
    prompts.write_text("".join(f"a large red star, {k}\n" for k in range(pictures // OF_EACH)))
    began = time.perf_counter()
    subprocess.run(
        [
            *(sys.executable, PROJECT_DIR / "tools" / "run_all.py", "--prompts_file", prompts),
            *("--num_images_per_prompt", str(OF_EACH), "--num_inference_steps", "1"),
            *("--height", "64", "--width", "64", "--output_dir", folder, "--progress", "off"),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    seconds = time.perf_counter() - began
    memory = {
        stage: report.peak_host_bytes / 1e6
        for stage in (1, 2, 3)
        if (report := read_report(folder, stage)) is not None
    }
    told = ", ".join(f"stage {stage} {most:.0f} MB" for stage, most in memory.items())
    print(f"{pictures} pictures in {seconds:.0f} s: {told}", flush=True)
    assert len(read_index(folder)) == pictures
    return memory


def open_page(page: Path) -> float:
    """The seconds until Chromium has loaded a page."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page()
        tab.goto("about:blank")
        began = time.perf_counter()
        tab.goto(page.resolve().as_uri(), wait_until="load", timeout=120_000)
        seconds = time.perf_counter() - began
        browser.close()
    return seconds


def main(
    pictures: Annotated[int, typer.Option("--pictures")] = 10_000,
    beside: Annotated[int, typer.Option("--beside")] = 500,
) -> None:
    """Make a large run beside a smaller one, and its page."""
    wrong = []
    with tempfile.TemporaryDirectory() as place:
        small, large = (run(count, Path(place) / str(count)) for count in (beside, pictures))
        for stage in (2, 3):
            ratio = large[stage] / small[stage]
            print(f"stage {stage}: {ratio:.2f} of the memory of {beside} pictures")
            if ratio > MOST_MEMORY:
                wrong.append(f"stage {stage} takes more than {MOST_MEMORY} times the memory")
        page = Path(place) / str(pictures) / "report.html"
        command = [sys.executable, PROJECT_DIR / "tools" / "report_page.py", page.parent]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        size = page.stat().st_size
        print(f"page: {size / 1e6:.2f} MB beside its thumbnails")
        if size > MOST_BYTES:
            wrong.append(f"the page is larger than {MOST_BYTES / 1e6:.0f} MB")
        if CHROMIUM is None:
            print("page: not opened, there is no Chromium")
        else:
            seconds = open_page(page)
            print(f"page: open after {seconds:.2f} s")
            if seconds > MOST_SECONDS:
                wrong.append(f"the page takes more than {MOST_SECONDS:.0f} s")
    for line in wrong:
        print(line)
    raise typer.Exit(bool(wrong))


if __name__ == "__main__":
    typer.run(main)
