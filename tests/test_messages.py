"""What a run prints goes to the standard output, warnings to the standard error."""

import os
import pty
import subprocess
import sys
import termios

import pytest

from common import messages
from common.messages import progress_bar, say, warn
from tests.conftest import PROJECT_DIR


def test_a_line_and_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    say("stage 1: encode")
    warn("--eta has no effect")
    printed = capsys.readouterr()
    assert printed.out == "stage 1: encode\n"
    assert printed.err == "warning: --eta has no effect\n"


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(messages, "SECONDS_BETWEEN_LINES", 0.0)
    with progress_bar(3, "denoise", "step") as bar, progress_bar(3, "x", "y", hidden=True) as none:
        for _ in range(3):
            bar.unpause()
            bar.update()
            none.update()
    assert capsys.readouterr().out == "  denoise: 1 of 3 steps\n  denoise: 2 of 3 steps\n"
    monkeypatch.setattr(messages, "SECONDS_BETWEEN_LINES", 30.0)
    with progress_bar(3, "denoise", "step") as bar:
        bar.update(2)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("size", [(0, 0), (24, 0), (24, 100)])
def test_progress_is_a_bar_on_a_terminal_of_any_size(size: tuple[int, int]) -> None:
    """One of a program knows no size of its own."""
    terminal, its_end = pty.openpty()
    termios.tcsetwinsize(terminal, size)
    program = (
        "from common.messages import progress_bar\n"
        "with progress_bar(2, 'denoise', 'step', leave=True) as bar: bar.update(2)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=PROJECT_DIR, stderr=its_end, check=True)
    os.close(its_end)
    assert b"denoise: 100%" in os.read(terminal, 4096)
