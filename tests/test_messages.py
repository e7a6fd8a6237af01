"""What a run prints goes to the standard output, warnings to the standard error."""

import pytest

from common.messages import say, warn


def test_a_line_and_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    say("stage 1: encode")
    warn("--eta has no effect")
    printed = capsys.readouterr()
    assert printed.out == "stage 1: encode\n"
    assert printed.err == "warning: --eta has no effect\n"
