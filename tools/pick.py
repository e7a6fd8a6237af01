"""Copy some pictures of a run, with all that they were made from, to a run of their own.

    python tools/pick.py stage_outputs 137,140-150 --output_dir stage_outputs/best

The new run has their prompts and seeds; its files are fresh, so that one can go on from any stage.
Nothing is computed.
"""

import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.stopping import stop_at_once_on_signals

if __name__ == "__main__":  # the other imports take a second
    stop_at_once_on_signals()

import typer

from common.commands import Debug, flag, make_command
from common.messages import say
from common.process import run_command
from common.runs.pick import pick

PICK = "What to copy"


def main(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The run directory.")],
    images: Annotated[str, typer.Argument(metavar="N,…", help="Indices and ranges of them.")],
    output_dir: Annotated[Path, flag("output_dir", "DIR", PICK, "The new run directory.")],
    debug: Debug = False,
) -> int:
    """Copy some pictures of a run, as 137,140-150, to a run of their own."""
    picked, code = pick(run_dir, images, output_dir)
    if code == 0:
        say(f"{len(picked)} picture(s): {output_dir}")
    return code


if __name__ == "__main__":
    run_command(make_command(main))
