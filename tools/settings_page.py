"""Write docs/settings.md: all settings and flags, a row each, from their declarations.

python tools/settings_page.py
"""

import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

PROJECT_DIR = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT_DIR))

from common.stopping import stop_at_once_on_signals

if __name__ == "__main__":  # the other imports take a second
    stop_at_once_on_signals()

from common.commands import Debug, flag, make_command
from common.files.contracts import tensor_table
from common.files.stage_table import STAGES
from common.messages import say
from common.process import run_command
from common.runs.flags import GROUPS, Flag, all_flags
from common.sampling.schedulers import SCHEDULERS
from common.whole_files import write_text_whole
from tools import run_all

PAGE = PROJECT_DIR / "docs" / "settings.md"
HEAD = """# Settings

Every flag of the stages' scripts and of `./run_all.sh`. Settings are keys of a `--config` file as
well, under the flag's name without its hyphens or the one in brackets. `tools/settings_page.py`
writes this page from the declarations, which stand in the packages whose settings they are;
`docs/extending.md` says how one is added.

Built-in defaults < `--config` < flags. Stage 1 settles all settings of a run; a later stage takes
those that shape what it makes, for that run of that stage. *makes stale* names the first of the
run's files that is made anew when the value changes; nothing stands there for flags that say how to
compute, or where.
"""
COLUMNS = ("flag", "takes", "meaning", "default", "bounds", "stages", "makes stale", "in web UIs")
# What pydantic keeps of a bound → how it is said.
BOUNDS = {
    "ge": "≥ {}",
    "gt": "> {}",
    "le": "≤ {}",
    "lt": "< {}",
    "pattern": "`{}`",
}


def main(
    output: Annotated[
        Path, flag("output", "FILE", "What to write", "The page. [docs/settings.md]")
    ] = PAGE,
    debug: Debug = False,
) -> None:
    """Write the page of all settings."""
    write_text_whole(output, page(all_flags()))
    say(f"wrote {output}")


def page(flags: Sequence[Flag]) -> str:
    """The page, as Markdown."""
    lines = [HEAD]
    for group in GROUPS:
        rows = [row_of(flag) for flag in flags if flag.declared.group == group]
        if rows:
            lines += [f"## {group}\n", *table_of([COLUMNS, *rows]), ""]
    for panel in (run_all.RUN_ALL, run_all.SERVING, run_all.PASSES):
        lines += [f"## {panel}\n", *_own_of_run_all(panel), ""]
    lines += ["## Schedulers\n", *_schedulers()]
    lines += ["", "## Tensors that the stages exchange\n", tensor_table().rstrip()]
    return "\n".join(lines) + "\n"


def row_of(flag: Flag) -> tuple[str, ...]:
    """A flag's row: its columns as `COLUMNS` has them."""
    declared = flag.declared
    names = f"`--{flag.name}`"
    if declared.determines and flag.field != flag.name:
        names += f" (`{flag.field}`)"
    if declared.none_flag is not None:
        names += f", `--{declared.none_flag[0]}`"
    stages = [stage for stage in STAGES if flag.is_of(stage)]
    makers = [stage for stage in STAGES if stage.makes in declared.makes]
    return (
        names,
        f"`{declared.metavar}`" if flag.has_value else "",
        declared.text,
        flag.default_in_words(),
        bounds_of(flag),
        ", ".join(str(stage.number) for stage in stages) + (" alone" if declared.alone else ""),
        makers[0].makes if declared.determines else "",
        declared.web_ui or "",
    )


def bounds_of(flag: Flag) -> str:
    """What its values must be, besides what its meaning says."""
    found = []
    for item in flag.model.model_fields[flag.field].metadata:
        for name, form in BOUNDS.items():
            if (bound := getattr(item, name, None)) is not None:
                is_large = isinstance(bound, int) and bound > 2**31
                found.append(form.format(f"2^{math.log2(bound):.0f}" if is_large else bound))
    return ", ".join(found)


def table_of(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows as a Markdown table; the first one is its head."""
    for number, row in enumerate(rows):
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
        if number == 0:
            yield "|" + "---|" * len(row)


def _own_of_run_all(panel: str) -> Iterator[str]:
    yield "Of `./run_all.sh` alone.\n"
    rows = [("flag", "takes", "meaning and default")]
    for parameter in run_all.make_command().params:
        if getattr(parameter, "rich_help_panel", None) == panel:
            text = str(getattr(parameter, "help", "")).replace("\\[", "[")
            rows.append((f"`--{parameter.name}`", f"`{parameter.metavar}`", text))
    yield from table_of(rows)


def _schedulers() -> Iterator[str]:
    yield "`--scheduler` takes these names, and the names of diffusers' classes.\n"
    rows = [("name", "diffusers' class", "with", "in web UIs")]
    for name, row in SCHEDULERS.items():
        options = ", ".join(f"`{key}={value}`" for key, value in row.options.items())
        rows.append((f"`{name}`", f"`{row.class_name}`", options, row.web_ui))
    yield from table_of(rows)


if __name__ == "__main__":
    run_command(make_command(main))
