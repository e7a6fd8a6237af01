"""Serve HTTP requests with Ray Serve: replicas, as many as requests want.

    python tools/serve_on_ray.py --max_replicas 4 --port 8000
    serve run tools.serve_on_ray:application max_replicas=4 model_id=...

Flags, or the arguments of `serve run`, are those of `run_all.sh --serve` (docs/scale.md).
"""

import os
import sys
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.stopping import STOP_SIGNALS, finishing_first, stop_at_once_on_signals

if __name__ == "__main__":  # the other imports take a second
    stop_at_once_on_signals()

if find_spec("ray") is None:
    print("error: ray is not installed: tools/set_up.sh ray installs it", file=sys.stderr)
    sys.exit(5)

import typer
from typer.core import TyperCommand

from common.commands import FlagsOf, flag
from common.compute.options import API_KEY
from common.errors import BadSettingError
from common.files.run_files import DEFAULT_OUTPUT_DIR
from common.messages import say
from common.process import run_command
from common.runs.flags import add_flags
from common.runs.in_turn import flags_of_a_run
from common.serving.server import catalog_of, refuse_open_address
from tools import run_all
from tools.run_all import FOLDERS, JOBS_FOLDER, OF_PROCESSES, OF_REPLICAS, refuse_unserved

SCALING = "Replicas"
SCALES = {"min_replicas", "max_replicas", "waiting", "host_chips"}
OWN = {"address", "queue_dir", *SCALES, *OF_REPLICAS}


def main(
    context: typer.Context,
    address: Annotated[
        str | None, flag("address", "HOST", SCALING, "auto or a cluster's; else: here.")
    ] = None,
    min_replicas: Annotated[
        int, flag("min_replicas", "N", SCALING, "At least so many. [1]", least=1)
    ] = 1,
    max_replicas: Annotated[
        int, flag("max_replicas", "N", SCALING, "As many as requests want. [1]", least=1)
    ] = 1,
    queue_dir: Annotated[
        str | None, flag("queue_dir", "DIR", SCALING, "For several hosts: on the head node's disk.")
    ] = None,
    host_chips: Annotated[
        str | None, flag("host_chips", "NAME:N", SCALING, "Of hosts to come: TPU:8. [as there]")
    ] = None,
    waiting: Annotated[
        int, flag("waiting", "N", SCALING, "Requests of one, before there are more. [8]", least=1)
    ] = 8,
) -> int:
    """Serve HTTP requests with Ray Serve, until a signal to stop comes.

    Defaults stand in brackets; hyphens in flags work as well.
    """
    from common.scale import ray_pools, replicas

    given = context.params
    host, port = given["host"], given["port"]
    serving, scaling = parts(given)
    refuse_open_address(host, serving.api_key)
    ray_pools.join(address, debug=bool(given.get("debug")))
    with (
        finishing_first() as stop,
        replicas.served(serving, scaling, host=host, port=port) as (host, port),
    ):
        if replicas.wait_until_it_answers(scaling, stop):
            say(f"ready: http://{host}:{port}")
        while stop.number is None:
            time.sleep(replicas.SECONDS_BETWEEN_LOOKS)
    return STOP_SIGNALS[stop.number][1]


def application(arguments: Mapping[str, Any]) -> Any:
    """The application, for `serve run` and a service's YAML.

    Args:
        arguments: flags by their names; a switch is true.

    Raises:
        BadSettingError: one is wrong.
    """
    from common.scale import replicas

    given = [f"--{k}" if v is True or v == "true" else f"--{k}={v}" for k, v in arguments.items()]
    with make_command().make_context("serve run", given) as context:
        for name in ("address", "host", "port"):
            if name in arguments:
                raise BadSettingError(f"{name} is Serve's own: give it to serve run")
        return replicas.application_of(*parts(context.params))


def parts(given: Mapping[str, Any]) -> tuple[Any, Any]:
    """What is served, and by how many."""
    from common.scale.replicas import Scaling, Serving

    flags = {k: v for k, v in given.items() if k not in OWN and v not in (None, [], ())}
    refuse_unserved(flags, [])
    jobs_dir = Path(flags.pop("output_dir", None) or DEFAULT_OUTPUT_DIR / JOBS_FOLDER)
    serving = Serving(
        jobs_dir=str(jobs_dir.expanduser().resolve()),
        queue_dir=given["queue_dir"] and str(Path(given["queue_dir"]).expanduser().resolve()),
        flags=flags,
        api_key=given["api_key"] or os.environ.get(API_KEY),
        kept=given["keep_jobs"],
        of_processes={
            name: given[name] for name in OF_PROCESSES if given.get(name) not in (None, [])
        },
        folders={name: given[name] for name in FOLDERS},
    )
    catalog_of(serving.flags, serving.folders)
    scaling = Scaling(
        least=given["min_replicas"],
        most=given["max_replicas"],
        waiting=given["waiting"],
        host_chips=given["host_chips"],
    )
    scaling.check()
    return serving, scaling


def make_command() -> TyperCommand:
    """One command with this program's own flags, those of a server and those of a run."""
    return add_flags(main, [FlagsOf(run_all.main, OF_REPLICAS), *flags_of_a_run()])


if __name__ == "__main__":
    run_command(make_command(), "python tools/serve_on_ray.py")
