"""A stage's own words: why it runs, and where its time went."""

from pathlib import Path

from common.compute.clock import StageReport
from common.compute.profile_tables import lines_of
from common.files.report import Profile as ProfileReport
from common.files.report import Repeat as RepeatReport
from common.messages import say
from common.runs.overrides import Overrides, values_in_words


def say_why(stale: str | None, overrides: Overrides, dropped: Overrides) -> None:
    """Print why a stage runs and which of the run's settings its flags override.

    Args:
        dropped: overrides by which was made what the stage is to replace.
    """
    if stale is not None:
        say(f"  because {stale}")
    if dropped:
        said = f"what was made with {values_in_words(dropped)}, in place of the run's own"
        say(f"  drops {said}: --keep_overrides goes on with it")
    for name, (before, after) in overrides.items():
        say(f"  override, for this run of this stage: {name} {before} → {after}")


def say_times(report: StageReport, path: Path, profile: ProfileReport | None = None) -> None:
    """Print where a stage's time went, what it wrote, and what it compiled and measured."""
    parts = [
        f"{name.replace('_', ' ')} {seconds:.1f}"
        for name, seconds in report.parts().items()
        if seconds >= 0.05 or name == "run"
    ]
    say(f"  wrote {path} in {report.wall_seconds():.1f} s ({', '.join(parts)})")
    programs = report.programs
    if programs.each:
        say(f"  programs: {programs.compiled} compiled, {programs.from_cache} from the cache")
    if report.repeats:
        spread = RepeatReport.of(report.repeats)
        say(
            f"  {len(report.repeats)} further run(s): median {spread.median:.4f} s, "
            f"{spread.min:.4f} to {spread.max:.4f}"
        )
    for line in lines_of(profile) if profile is not None else ():
        say(line)
