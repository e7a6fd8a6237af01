"""docs/settings.md is what its generator writes, and has every flag of every command."""

from common.files.stage_table import STAGES
from common.runs.flags import all_flags, command_of
from common.sampling.schedulers import SCHEDULERS
from tools import run_all
from tools.settings_page import PAGE, page


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(all_flags()), (
        "docs/settings.md is stale: python tools/settings_page.py"
    )


def test_it_has_a_row_for_every_flag_of_every_command() -> None:
    commands = [command_of(stage, lambda _: None, "") for stage in STAGES]
    names = {p.name for command in [*commands, run_all.make_command()] for p in command.params}
    names.remove("version")  # no setting, as --help is none
    text = PAGE.read_text(encoding="utf-8")
    assert len(names) > 60
    assert not [name for name in names if f"`--{name}`" not in text]
    assert not [name for name in SCHEDULERS if f"| `{name}` |" not in text]
