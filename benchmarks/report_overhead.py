"""What a stage's report costs: the seconds that its own code takes, of the stage's wall time.

    python benchmarks/report_overhead.py

Runs the three stages of the demo checkpoint, everything cached, with a clock around every function
of the report and around XLA's count of FLOPs, and prints the median share of some runs.
"""

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

PROJECT_DIR = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT_DIR))

import typer

from common.files.report import read_report
from common.files.stage_table import OF_EVERY_RUN

# Runs a stage with the clock, which is printed when the process ends.
PROGRAM = """
import atexit, json, runpy, sys, time
sys.path.insert(0, sys.argv[1])
from common.compute import clock
from common.files.stage_table import FIRST

spent = 0.0

def clocked(function):
    def timed(*arguments, **options):
        global spent
        began = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            spent += time.perf_counter() - began
    return timed

for name in ("__init__", "_charge", "phase", "write", "parts"):
    setattr(clock.StageReport, name, clocked(getattr(clock.StageReport, name)))
clock.own_memory = clocked(clock.own_memory)
if sys.argv[2] != FIRST.script:
    import jax
    jax.stages.Compiled.cost_analysis = clocked(jax.stages.Compiled.cost_analysis)
atexit.register(lambda: print(json.dumps(spent)))
script = f"{sys.argv[1]}/stages/{sys.argv[2]}"
sys.argv = [script, *sys.argv[3:]]
runpy.run_path(script, run_name="__main__")
"""


def main(
    repeat: Annotated[int, typer.Option("--repeat", help="Runs of each stage.")] = 7,
) -> None:
    """Print the report's share of each stage's time."""
    with tempfile.TemporaryDirectory() as folder:
        shares: dict[str, list[float]] = {stage.name: [] for stage in OF_EVERY_RUN}
        for round_number in range(repeat + 1):
            for stage in OF_EVERY_RUN:
                command = [sys.executable, "-c", PROGRAM, str(PROJECT_DIR), stage.script]
                done = subprocess.run(
                    [*command, "--output_dir", folder], check=True, capture_output=True, text=True
                )
                report = read_report(Path(folder), stage.number)
                assert report is not None
                if round_number:  # the first round fills the compile cache
                    spent = float(done.stdout.splitlines()[-1])
                    shares[stage.name].append(spent / report.wall_seconds)
    for name, found in shares.items():
        median, most = statistics.median(found), max(found)
        print(f"{name:20} report {median:.2%} of the wall time (most {most:.2%} of {repeat} runs)")


if __name__ == "__main__":
    typer.run(main)
