"""The planner's command: what it prints, and what it refuses."""

import re
import subprocess
import sys

import pytest

from tests.conftest import PROJECT_DIR

TOOL = PROJECT_DIR / "tools" / "plan_scale.py"


def plan(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, TOOL, *flags], capture_output=True, text=True)


def numbers(said: str, title: str) -> list[float]:
    (line,) = (line for line in said.splitlines() if line.startswith(f"  {title} "))
    return [float(each) for each in re.findall(r"\d+(?:\.\d+)?", line)]


def test_hosts_hours_and_what_they_share() -> None:
    """Ten times the hosts take a tenth of the hours, and as many chip-hours."""
    one = plan("--images=10000000", "--topology=v6e:2x4")
    ten = plan("--images", "10000000", "--hosts=10", "--simulate", "--format=folder")
    assert one.returncode == ten.returncode == 0, one.stderr + ten.stderr
    assert numbers(one.stdout, "hours")[0] == pytest.approx(
        10 * numbers(ten.stdout, "hours")[0], rel=0.01
    )
    assert numbers(one.stdout, "chip-hours")[0] == numbers(ten.stdout, "chip-hours")[0]
    rows = [line.split(" | ") for line in ten.stdout.splitlines() if re.match(r"\| \d", line)]
    assert [row[0].strip("| ") for row in rows] == ["1", "10", "100", "1000"]
    assert rows[-1][-1] == "the target's files |" and rows[0][-1] == "nothing |"


def test_more_hosts_than_the_target_has_room_for() -> None:
    told = plan("--images=100000000", "--hours=24", "--format=folder")
    assert "too much     for the target's files, which would be over 90% busy" in told.stdout


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--hosts=1", "--hours=1"], "give one of them"),
        (["--hours=0"], "--hours 0: give more than 0"),
        (["--text_cores=180"], "--text_cores 180: give fewer than the 180 of a host"),
        (["--topology=v6e:1x1", "--text_cores=44"], "give fewer than the 44 of a host"),
        (["--format=zip"], "'zip' is not one of 'folder', 'webdataset', 'parquet'"),
        (["--preemptions=300"], "--preemptions 300: hosts that are lost so often make nothing"),
        (["--target_gb_per_second=0"], "--target_files_per_second: give more"),
        (["--keep_latents"], "--keep_latents is for --format folder, not webdataset"),
        (["--topology=v5e:2x4"], "estimates are there for v6e:2x4"),
    ],
)
def test_what_is_refused(flags: list[str], said: str) -> None:
    told = plan("--images=1000", *flags)
    assert told.returncode == 2 and said in told.stderr
