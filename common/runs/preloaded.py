"""A stage's process that imports its libraries while the stage before it runs.

`run_all.sh` starts it ahead with `PreloadedStage`; this file is also the script that it runs.
"""

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

PROJECT_DIR = Path(__file__).resolve().parents[2]


class PreloadedStage:
    """A process that waits for its turn."""

    def __init__(self, script: str, modules: Sequence[str]) -> None:
        """
        Args:
            script: the stage's.
            modules: to import while it waits.
        """
        from common.stopping import holding_signals  # this file is a script as well, without a path

        command = [sys.executable, __file__, script, *modules]
        with holding_signals():
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)

    def begin(self, arguments: Sequence[str]) -> "subprocess.Popen[str] | None":
        """Let the stage run with arguments; None where the process is no more."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(list(arguments)) + "\n")
            self.process.stdin.close()
        except OSError:
            return None
        return self.process

    def give_up(self) -> None:
        """Let the process end; its turn does not come."""
        self.process.kill()
        self.process.wait()


def main() -> None:
    """Import modules, wait for the arguments on the standard input, run the script."""
    script, *modules = sys.argv[1:]
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # else the stage is to ignore it as well
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing is begun
    sys.path[0] = str(PROJECT_DIR)  # in place of this file's folder, whose names hide others
    from common.compute.clock import count_from_now
    from common.models.library_imports import quiet_libraries
    from common.process import keep_to_ourselves
    from common.stopping import hold_signals, let_signals_through

    let_signals_through()
    keep_to_ourselves()
    quiet_libraries()
    for module in modules:
        if select.select([sys.stdin], [], [], 0)[0]:
            break  # its turn has come, and may need none of them
        try:
            import_module(module)
        except Exception:
            break  # the script will say so, if it needs it
    line = sys.stdin.readline()
    if not line:
        return
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    count_from_now()
    sys.argv = [script, *json.loads(line)]
    import runpy

    hold_signals()
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
