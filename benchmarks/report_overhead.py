"""What a stage's report costs: the seconds that its own code takes, of the stage's wall time.

    python benchmarks/report_overhead.py

Runs the three stages of the demo checkpoint, everything cached, with a clock around every function
of the report and around XLA's count of FLOPs, and prints the median share of some runs.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

PROJECT_DIR = Path(__file__).resolve().parent.parent

import typer

STAGES = ("stage1_text_encoder", "stage2_unet", "stage3_vae_decoder")
# Runs a stage with the clock, which is printed when the process ends.
PROGRAM = """
import atexit, json, runpy, sys, time
sys.path.insert(0, sys.argv[1])
from common import report

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
    setattr(report.StageReport, name, clocked(getattr(report.StageReport, name)))
report.own_memory = clocked(report.own_memory)
if sys.argv[2] != "stage1_text_encoder":
    import jax
    jax.stages.Compiled.cost_analysis = clocked(jax.stages.Compiled.cost_analysis)
atexit.register(lambda: print(json.dumps(spent)))
script = f"{sys.argv[1]}/stages/{sys.argv[2]}.py"
sys.argv = [script, *sys.argv[3:]]
runpy.run_path(script, run_name="__main__")
"""


def main(
    repeat: Annotated[int, typer.Option("--repeat", help="Runs of each stage.")] = 7,
) -> None:
    """Print the report's share of each stage's time."""
    with tempfile.TemporaryDirectory() as folder:
        shares: dict[str, list[float]] = {stage: [] for stage in STAGES}
        for round_number in range(repeat + 1):
            for number, stage in enumerate(STAGES, 1):
                command = [sys.executable, "-c", PROGRAM, str(PROJECT_DIR), stage]
                done = subprocess.run(
                    [*command, "--output_dir", folder], check=True, capture_output=True, text=True
                )
                report = json.loads((Path(folder) / f"stage{number}_report.json").read_text())
                if round_number:  # the first round fills the compile cache
                    spent = float(done.stdout.splitlines()[-1])
                    shares[stage].append(spent / report["wall_seconds"])
    for stage, found in shares.items():
        median, most = statistics.median(found), max(found)
        print(f"{stage:20} report {median:.2%} of the wall time (most {most:.2%} of {repeat} runs)")


if __name__ == "__main__":
    typer.run(main)
