"""Settings of a run that one stage's flags override, as what it made records them."""

from pathlib import Path
from typing import Any

from common.errors import BadInputFileError
from common.files import artifacts
from common.files.report import read_report
from common.files.stage_table import Stage

Overrides = dict[str, list[Any]]  # setting → the run's value, and the one in its place


def overrides_of(run_dir: Path, stage: Stage) -> Overrides:
    """Those by which a stage made what it wrote; none where it wrote nothing, or as settled."""
    try:
        if stage.writes:
            header = artifacts.inspect(run_dir / stage.writes[0], verify=False).header
            found = {} if header is None else header.provenance.get("overrides")
        else:
            report = read_report(run_dir, stage.number)
            found = {} if report is None else report.overrides
    except BadInputFileError:
        return {}
    return checked(found)


def checked(found: Any) -> Overrides:
    """What a file says of overrides; none where it is not of that form."""
    pairs = found if isinstance(found, dict) else {}
    if all(isinstance(pair, list) and len(pair) == 2 for pair in pairs.values()):
        return pairs
    return {}


def values_of(overrides: Overrides) -> dict[str, Any]:
    """The values in place of the run's."""
    return {name: after for name, (_, after) in overrides.items()}


def values_in_words(overrides: Overrides) -> str:
    """As in "seed 7, guidance_scale 3.0"."""
    return ", ".join(f"{name} {after}" for name, after in values_of(overrides).items())
