"""The settings of pictures that are picked are those that they were made with."""

import json
from pathlib import Path

from common.errors import BadInputFileError, BadSettingError
from common.runs.generation import read_generation_config
from common.runs.pick import picked_config
from tests.refusals import refusal


def test_seeds_and_overrides_are_settled(run_copy: Path) -> None:
    config, chosen = picked_config(run_copy, "1,0")
    before = read_generation_config(run_copy)
    assert chosen == [1, 0] and config.num_images_per_prompt == 1
    assert config.image_seeds() == [*reversed(before.image_seeds())]
    assert [prompt.prompt for prompt in config.prompts] == [before.prompts[0].prompt] * 2
    with refusal(BadSettingError, "the run has images 0 to 1"):
        picked_config(run_copy, "2")


def test_a_run_that_begins_with_latents_of_another_one(run_copy: Path) -> None:
    path = run_copy / "generation_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"init_latents": "other_run"}))
    with refusal(BadSettingError, "begins with latents of other_run", "--init_latents"):
        picked_config(run_copy, "0")
    with refusal(BadInputFileError, "is missing"):
        picked_config(run_copy / "gone", "0")
