"""What flags overrode is told before it is replaced, and can be gone on with."""

import json
from pathlib import Path

import pytest

from common.files.stage_table import DECODE, DENOISE, ENCODE, LATENTS_FILE
from common.runs.overrides import checked, overrides_of, values_in_words, values_of
from common.runs.record import FRESH, read_run
from tests.conftest import Run
from tests.printed import header_of


def test_overrides_are_not_staleness(run_copy: Path, quick_stage: Run) -> None:
    """The two commands of a user who tried another seed, then another format of pictures."""
    own = ("--output_dir", run_copy, "--skip_fresh")
    assert quick_stage(2, *own, "--seed", 7).returncode == 0
    webp = ("--image_format", "webp", "--name_template", "{seed}")
    assert quick_stage(3, *own, *webp).returncode == 0
    assert overrides_of(run_copy, DENOISE) == {"seed": [42, 7]}
    overridden = {"image_format": ["png", "webp"], "name_template": [None, "{seed}"]}
    assert overrides_of(run_copy, DECODE) == overridden
    assert overrides_of(run_copy, ENCODE) == {}
    states = {file.name: (file.state, file.why) for file in read_run(run_copy).files}
    assert states[LATENTS_FILE] == (FRESH, "overridden: seed 7")
    said = "overridden: image_format webp, name_template {seed}"
    assert states["8.webp"] == states["output_grid.webp"] == (FRESH, said)

    for number in (2, 3):
        kept = quick_stage(number, *own, "--keep_overrides")
        assert kept.returncode == 0 and "fresh (" in kept.stdout, kept.stderr
    assert json.loads((run_copy / "generation_config.json").read_text())["seed"] == 42

    dropped = quick_stage(2, *own).stdout
    assert "drops what was made with seed 7, in place of the run's own: --keep_overrides" in dropped
    assert header_of(run_copy / LATENTS_FILE)["provenance"]["overrides"] == {}
    dropped = quick_stage(3, *own).stdout
    assert "drops what was made with image_format webp, name_template {seed}" in dropped
    assert "removed 3 picture(s) that an earlier run made: 7.webp, 8.webp, output_grid" in dropped
    assert {state for file in read_run(run_copy).files for state in (file.state,)} == {FRESH}
    assert "drops" not in quick_stage(2, "--output_dir", run_copy).stdout


@pytest.mark.parametrize("found", [None, [], ["seed 1 → 2"], {"seed": 7}, {"seed": [1]}])
def test_what_is_of_another_form_is_none(found: object) -> None:
    assert checked(found) == {}


def test_values_are_told_in_words(tmp_path: Path) -> None:
    overrides = checked({"seed": [42, 7], "scheduler": [None, "ddim"]})
    assert values_of(overrides) == {"seed": 7, "scheduler": "ddim"}
    assert values_in_words(overrides) == "seed 7, scheduler ddim"
    assert overrides_of(tmp_path, DENOISE) == overrides_of(tmp_path, DECODE) == {}
    (tmp_path / LATENTS_FILE).write_bytes(b"damaged")
    assert overrides_of(tmp_path, DENOISE) == {}
