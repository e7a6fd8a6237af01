"""The groups of settings: each setting declared once, and each in a run's settings."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from common.declared import EMBEDDINGS, LATENTS, Settings, declarations
from common.files import artifacts
from common.files.picture_files import read_picture_record
from common.files.stage_table import LATENTS_FILE
from common.runs.generation import GenerationConfig, RunSettings
from common.runs.setting_groups import ASKED, SHARED
from tests.own_process import import_from, read_pages, run_stages

# A setting for each artifact, which nothing else of the project knows.
NEW_GROUP = """
from typing import Literal

from common.declared import EMBEDDINGS, FILES, LATENTS, PICTURES, PROMPTS, SAMPLING
from common.declared import Settings, setting
from common.runs.setting_groups import SHARED


class NewSettings(Settings):
    wording: Literal["plain", "flowery"] = setting(
        "plain", "How prompts are put.", metavar="HOW", group=PROMPTS, shapes=(EMBEDDINGS,)
    )
    warmth: float = setting(
        0.0, "Of the colours.", metavar="X", group=SAMPLING, shapes=(LATENTS,),
        web_ui="Warmth", ge=0,
    )
    border: int | None = setting(
        None, "Pixels around a picture.", metavar="N", group=FILES, shapes=(PICTURES,),
        shown="no border",
    )


SHARED.append(NewSettings)
"""


def declared_names(groups: list[type[Settings]]) -> list[str]:
    """The settings that groups declare themselves, those of a base once."""
    own = {(base, name) for group in groups for base in group.__mro__ if issubclass(base, Settings)
           for name in base.__annotations__.keys() & dict(declarations(base)).keys()}  # fmt: skip
    return [name for _, name in own]


def test_no_setting_is_declared_twice() -> None:
    twice = [name for name, count in Counter(declared_names(ASKED + SHARED)).items() if count > 1]
    assert not twice, f"declared in two groups: {', '.join(twice)}"


def test_a_runs_settings_are_those_of_the_groups() -> None:
    assert set(RunSettings.model_fields) == set(declared_names(ASKED + SHARED))
    assert set(declared_names(SHARED)) <= set(GenerationConfig.model_fields)


def test_every_field_of_a_group_is_declared() -> None:
    """One that is not has no flag and is in no recipe."""
    for group in ASKED + SHARED:
        assert set(group.model_fields) == set(dict(declarations(group))), group.__name__


class WithNewGroup:
    """Runs of the demo checkpoint in a process that knows a group more than the project has."""

    def __init__(self, folder: Path) -> None:
        (folder / "new_group.py").write_text(NEW_GROUP)
        (folder / "settings.yaml").write_text("warmth: 0.5\nborder: 3\n")
        self.first, self.run_dir = import_from(folder, "new_group"), folder / "run"
        self.pages = read_pages(first=self.first)
        small = ["--num_inference_steps", 1, "--height", 64, "--width", 64]

        def stage(number: int, *flags: Any) -> list[Any]:
            by_torch = [] if number == 1 else ["--backend", "torch"]
            return [number, "--output_dir", self.run_dir, *by_torch, *flags]

        self.ended = run_stages(
            [
                stage(1, *small, "--config", folder / "settings.yaml", "--wording", "plain"),
                *(stage(number) for number in (2, 3)),
                *(stage(number, "--skip_fresh") for number in (2, 3)),
                stage(3, "--skip_fresh", "--border", 4),
                stage(2, "--skip_fresh", "--warmth", 0.75),
                stage(3, "--skip_fresh", "--border", 4),
                stage(1, *small, "--skip_fresh", "--warmth", 0.5, "--wording", "flowery"),
                stage(1, *small, "--warmth", -1),
                stage(2, "--border", 1),
            ],
            first=self.first,
        )


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> WithNewGroup:
    return WithNewGroup(tmp_path_factory.mktemp("new group"))


def test_a_new_setting_is_a_flag_with_help_where_it_counts(extended: WithNewGroup) -> None:
    stages = {name: extended.pages.stages_with(name) for name in ("wording", "warmth", "border")}
    assert stages == {
        "wording": {1: "How prompts are put. \\[plain]"},
        "warmth": dict.fromkeys((1, 2), "Of the colours. \\[0.0]"),
        "border": dict.fromkeys((1, 3), "Pixels around a picture. \\[no border]"),
    }
    assert {"wording", "warmth", "border"} <= set(extended.pages.swept)
    row = ["`--warmth`", "`X`", "Of the colours.", "0.0", "≥ 0", "1, 2", "latents", "Warmth"]
    assert extended.pages.row("--warmth") == row
    assert extended.pages.row("--wording")[-3:] == ["1", "embeddings", ""]
    *_, unasked, elsewhere = extended.ended
    assert (unasked.code, unasked.error) == (
        2,
        "--warmth -1.0: input should be greater than or equal to 0",
    )
    assert elsewhere.code == 2 and "--border" in elsewhere.error


def test_it_makes_stale_what_it_shapes_and_what_follows(extended: WithNewGroup) -> None:
    *made, two, three, border, warmth, follows, wording, _, _ = extended.ended
    assert [each.code for each in extended.ended[:-2]] == [0] * 9, extended.ended
    assert not [each.said for each in made if "because" in each.said]
    assert "stage 2: fresh" in two.said and "stage 3: fresh" in three.said
    assert "because border 3 → 4" in border.said
    assert "because warmth 0.5 → 0.75" in warmth.said
    assert "because warmth 0.5 → 0.75" in follows.said
    assert "because wording plain → flowery" in wording.said


def test_it_stands_in_recipes_and_pictures(extended: WithNewGroup) -> None:
    header = artifacts.inspect(extended.run_dir / LATENTS_FILE).header
    assert header is not None
    embeddings, latents = (header.recipe.settings[name] for name in (EMBEDDINGS, LATENTS))
    assert embeddings["wording"] == "plain" and latents["warmth"] == 0.75
    assert not {"warmth", "border"} & embeddings.keys()
    assert not {"wording", "border"} & latents.keys()
    picture = extended.run_dir / "output_image.png"
    record = read_picture_record(picture)
    assert record is not None
    settings = {name: record["settings"][name] for name in ("wording", "warmth", "border")}
    assert settings == {"wording": "plain", "warmth": 0.75, "border": 4}
    with Image.open(picture) as image:
        assert ", Warmth: 0.75" in image.info["parameters"]
