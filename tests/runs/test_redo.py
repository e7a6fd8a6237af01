"""The flags of an image are those that give its settings again, whatever they are."""

import shlex
from pathlib import Path
from typing import Any

import pytest

from common.files.stage_table import FIRST, numbered
from common.runs.flags import Given, command_of
from common.runs.generation import GenerationConfig, RunSettings, read_run_settings
from common.runs.redo import OF_PROMPTS, OF_SEVERAL, Redo, commands
from tests.runs.staleness_table import BASE, GENERATION, Case

MORE = {
    "embeddings": [{"file": "a b.safetensors"}, {"file": "red.safetensors", "token": "<red>"}],
    "loras": [{"file": "dir/x:y.safetensors", "scale": -0.5}, {"file": "l.safetensors"}],
    "scheduler_options": {"use_karras_sigmas": True, "timestep_spacing": "trailing", "shift": 1.5},
    "sigmas": [14.5, 1e-2, 0],
    "outpaint": [0, 64, 8, 0],
    "model_id": "~/a folder/with 'quotes'",
}


def read_again(arguments: list[str]) -> dict[str, Any]:
    """The settings that stage 1 reads from arguments."""
    found: list[dict[str, Any]] = []
    command = command_of(FIRST, lambda given: found.append(given.settings()), "")
    command.main(arguments, standalone_mode=False)
    return found[0]


def cases() -> list[Any]:
    tables = [(name, case) for name, each in GENERATION.items() for case in each]
    return [pytest.param(*pair, id=f"{pair[0]}-{k}") for k, pair in enumerate(tables)] + [
        pytest.param(name, to, id=f"more-{name}") for name, to in MORE.items()
    ]


@pytest.mark.parametrize(("name", "case"), cases())
def test_every_setting_comes_back(name: str, case: Case | Any) -> None:
    values: dict[str, Any] = dict(BASE[GenerationConfig])
    if isinstance(case, Case):
        values |= case.beside | {name: case.to}
    else:
        values |= {name: case} | ({"num_inference_steps": None} if name == "sigmas" else {})
        if name == "outpaint":
            values["prompts"] = [BASE[GenerationConfig]["prompts"][0] | {"image": "star.png"}]
    config = GenerationConfig.model_validate(values)
    image = len(config.image_seeds()) - 1
    (line, *_) = commands(Redo(config, {}).flags(image), {}, Path("out"))
    again = read_run_settings(None, read_again(shlex.split(line)[2:]))
    for field in RunSettings.model_fields.keys() & GenerationConfig.model_fields.keys():
        if field not in OF_SEVERAL and field != "seed":
            assert getattr(again, field) == getattr(config, field), field
    assert again.seed == config.image_seeds()[image]
    for field in OF_PROMPTS:
        own = getattr(config.prompts[image // config.num_images_per_prompt], field)
        many = field in ("prompt", "prompt_2", "image", "mask_image")
        assert getattr(again, field) == ((own,) if many and own is not None else own), field


def test_each_stage_is_told_how_its_bits_came_about() -> None:
    flags = {"prompt": ["a “red” star's"], "seed": "7"}
    options = {"backend": "jax", "mesh": "data=2", "batch_size": 4, "fill_groups": True}
    lines = commands(flags, {"2": options, "3": {"backend": "torch"}}, Path("again"))
    assert [line.split()[1] for line in lines] == [
        f"stages/{numbered(number).script}" for number in (1, 2, 3)
    ]
    assert shlex.split(lines[0])[2:] == [
        "--prompt=a “red” star's",
        "--seed=7",
        "--output_dir=again",
    ]
    given = [
        "--output_dir=again",
        "--backend=jax",
        "--mesh=data=2",
        "--batch_size=4",
        "--fill_groups",
    ]
    assert shlex.split(lines[1])[2:] == given
    assert shlex.split(lines[2])[2:] == ["--output_dir=again", "--backend=torch"]
    begun = commands(flags | {"image": ["star.png"]}, {"0": {"batch_size": 2}}, Path("again"))
    assert len(begun) == 4 and begun[1].endswith(" --output_dir=again --batch_size=2")


def test_given_is_what_the_stages_read() -> None:
    """The parameters of stage 2's command, as `commands` writes them."""
    options = {"backend": "jax", "mesh": "data=2", "batch_size": 4, "fill_groups": True}
    read = Given(numbered(2), options).options
    assert read.at_once(1) == 4 and read.mesh == "data=2" and read.backend == "jax"
