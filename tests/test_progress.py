"""How far a stage is: a bar on a terminal, elsewhere lines now and then, JSON for programs."""

import json
import os
import pty
import subprocess
import sys
import termios
from collections.abc import Iterator
from typing import Any, get_args

import pytest

from common import progress
from common.progress import Form, Look, Shown, progress_bar, show_progress_as, watched_by
from tests.conftest import PROJECT_DIR


class Clock:
    """A time that a test sets."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    yield made
    show_progress_as("auto")


def go(clock: Clock, form: Form) -> None:
    """Two groups of ten steps and two images each; an hour of compiling is no part of the rate."""
    show_progress_as(form)
    with progress_bar(40, "denoise", "step", images=8) as bar:
        bar.skip(20)  # by an earlier run
        clock.now += 3600
        bar.note("a large red star on a blue background, with more words than fit")
        bar.unpause()
        for _ in range(20):
            clock.now += 4
            bar.update()


def test_lines_come_now_and_then_where_there_is_no_terminal(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    go(clock, "auto")
    printed = capsys.readouterr()
    assert printed.err == ""
    # A step in four seconds, and eight images in forty steps.
    assert printed.out.splitlines() == [
        f"  denoise: {done} of 40 steps, 0.05 images/s, {left} left: "
        "a large red star on a blue background, …"
        for done, left in ((21, "1:16"), (29, "0:44"), (37, "0:12"))
    ]


def test_a_short_run_says_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(3, "decode", "image") as bar:
        for _ in range(3):
            clock.now += 9
            bar.update()
    assert capsys.readouterr() == ("", "")


def test_programs_read_objects(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    go(clock, "json")
    printed = capsys.readouterr()
    assert printed.out == ""
    told = [json.loads(line) for line in printed.err.splitlines()]
    assert [each["done"] for each in told] == [*range(20, 41)]
    assert told[0]["images_per_second"] is None and told[0]["seconds_left"] is None
    last = told[-1]
    assert last.keys() == {
        *("progress", "unit", "done", "total", "images", "images_per_second"),
        *("seconds_left", "at_work"),
    }
    assert (last["progress"], last["unit"], last["total"], last["images"]) == (
        "denoise",
        "step",
        40,
        8,
    )
    assert last["images_per_second"] == pytest.approx(20 / 80 * 8 / 40)
    assert last["seconds_left"] == 0 and told[11]["seconds_left"] == pytest.approx(9 * 4)


def test_nothing_is_shown_where_that_is_asked(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    go(clock, "off")
    show_progress_as("json")
    with progress_bar(2, "x", "y", hidden=True) as bar:
        clock.now += 100
        bar.update()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("size", [(0, 0), (24, 0), (24, 100)])
def test_a_terminal_of_any_size_has_a_bar(size: tuple[int, int]) -> None:
    """One of a program knows no size of its own."""
    terminal, its_end = pty.openpty()
    termios.tcsetwinsize(terminal, size)
    program = (
        "import time\n"
        "from common.progress import progress_bar\n"
        "with progress_bar(2, 'denoise', 'step', images=4, leave=True) as bar:\n"
        "    bar.note('a red star'); bar.unpause(); time.sleep(0.1); bar.update(2)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=PROJECT_DIR, stderr=its_end, check=True)
    os.close(its_end)
    said = os.read(terminal, 4096)
    assert b"denoise: 100%" in said and b"images/s, a red star" in said


def test_a_watcher_hears_of_what_is_shown_in_any_form(clock: Clock) -> None:
    class Noting:
        heard: list[tuple[str, int, Look | None]]

        def wants_look(self) -> bool:
            return False

        def hear(self, shown: Shown, look: Look | None) -> None:
            self.heard.append((shown.what, shown.done, look))

    look = dict[int, Any]
    for form in get_args(Form):
        show_progress_as(form)
        watcher = Noting()
        watcher.heard = []
        with watched_by(watcher), progress_bar(3, "decode", "image") as bar:
            bar.skip(1)
            with progress_bar(1, "x", "y", hidden=True) as inner:
                inner.update()
            bar.update(2, look)
        with progress_bar(1, "later", "image") as bar:
            bar.update()
        assert watcher.heard == [("decode", 0, None), ("decode", 1, None), ("decode", 3, look)]
