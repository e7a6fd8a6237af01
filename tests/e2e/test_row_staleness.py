"""Which rows a change makes stale: of one prompt's settings its own, of a run's all that it shapes.

The cases are those of `staleness_table.py`, in runs of two prompts.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from common import declared
from common.conditions.prompt_settings import PromptSettings
from common.files import artifacts
from common.files.artifacts import Artifact, Row, TensorLayout
from common.files.recipe import Recipe
from common.files.row_places import endings_of, size_in
from common.files.stage_table import EMBEDDINGS_FILE, IMAGE_LATENTS_FILE, LATENTS_FILE
from common.models.checkpoint import Checkpoint
from common.models.component_table import loaded_for
from common.models.find import open_checkpoint
from common.runs import recipes
from common.runs.generation import GenerationConfig
from common.runs.image_latents import read_inputs
from common.runs.init_latents import find_init_latents
from common.runs.jobs import latent_shape
from common.runs.pictures import Pictures
from tests.runs.staleness_table import AS_BEFORE, BASE, TABLE, WITHIN, Case
from tests.runs.test_recipes import at_places, from_fingerprint, places, used_on_cpu

__all__ = ["at_places", "places"]  # fixtures

OTHER = {"prompt": "a small blue ring", "negative_prompt": "dark"}
# Settings of a run that shape images by their seeds alone.
OF_SEEDS = ("seed", "same_seed", "seed_offset", "num_images_per_prompt")
Rows = dict[int, list[str]]  # stage → fingerprints


def made(name: str, recipe: Recipe, rows: list[Recipe], **shapes: tuple[int, ...]) -> Artifact:
    """A file as a stage would write it, whose data follow from what its rows are made by."""
    known = [
        Row(row.fingerprint(), from_fingerprint(row), ending=ending)
        for row, ending in zip(rows, endings_of(rows), strict=True)
    ]
    header = artifacts.make_header(recipe, {}, from_fingerprint(recipe), known)
    tensors = {key: TensorLayout("F32", shape) for key, shape in shapes.items()}
    return Artifact(
        path=Path(name), header=header, data_sha256=from_fingerprint(recipe), tensors=tensors
    )


def _cells(ending: str, config: GenerationConfig, checkpoint: Checkpoint) -> list[int]:
    size = size_in(ending) if ending else (config.height, config.width)
    return [side // checkpoint.vae_scale_factor for side in size]


def rows_of(config: GenerationConfig) -> Rows:
    """The rows of each stage, each made from those of the stages before it."""
    first = recipes.embeddings_recipe(
        config, open_checkpoint(config, loaded_for(declared.EMBEDDINGS))
    )
    of_prompts = recipes.embeddings_rows(config, first)
    embeddings = made(EMBEDDINGS_FILE, first, of_prompts)
    checkpoint = open_checkpoint(config, loaded_for(declared.LATENTS))
    of_vae = open_checkpoint(config, loaded_for(declared.PICTURES))
    found, begin = {1: of_prompts}, None
    if config.has_pictures:
        inputs = read_inputs(config)
        recipe = recipes.image_latents_recipe(config, of_vae, inputs, used_on_cpu(config.vae_dtype))
        found[0] = recipes.image_latents_rows(recipe, len(inputs.pictures))
        begin = made(IMAGE_LATENTS_FILE, recipe, found[0])
    else:
        begin = find_init_latents(config, checkpoint, Path("run"), verify=True)
    second = recipes.latents_recipe(
        config, checkpoint, embeddings, used_on_cpu(config.unet_dtype), begin
    )
    found[2] = recipes.latents_rows(config, second, embeddings, begin)
    channels, *_ = latent_shape(config, checkpoint)
    shapes = {
        f"latents{ending}": (count, channels, *_cells(ending, config, checkpoint))
        for ending, count in Counter(endings_of(found[2])).items()
    }
    latents = made(LATENTS_FILE, second, found[2], **shapes)
    begun = begin if config.pastes else None
    third = recipes.pictures_recipe(config, of_vae, latents, used_on_cpu(config.vae_dtype), begun)
    found[3] = Pictures.of(config, third, latents, begun).rows
    return {stage: [row.fingerprint() for row in rows] for stage, rows in found.items()}


def stale_rows(before: Rows, after: Rows) -> dict[int, set[int]]:
    """Stage → the rows that are not there any more, wherever they might stand."""
    return {
        stage: {row for row, own in enumerate(rows) if own not in after.get(stage, ())}
        for stage, rows in before.items()
    }


def cases(model: type[BaseModel]) -> list[Any]:
    return [
        pytest.param(name, one, id=f"{name}-{number}")
        for name, each in TABLE[model].items()
        for number, one in enumerate(each)
    ]


@pytest.mark.parametrize(("name", "change"), cases(PromptSettings))
def test_a_prompts_setting_makes_its_row_stale_and_no_other(name: str, change: Case) -> None:
    if name == "image" and change.of is AS_BEFORE:
        return  # a run begins with pictures or it does not, all prompts alike
    if name == "mask_image" and change.of is AS_BEFORE:
        change = replace(change, of="other_mask.png")
    if name == "seed" and change.to == 42:
        change = replace(change, to=43)  # that of the second image
    own = BASE[PromptSettings] | change.beside
    own |= {} if change.of is AS_BEFORE else {name: change.of}
    others = {key: own[key] for key in ("image", "mask_image") if key in own}

    def rows(values: dict[str, Any]) -> Rows:
        prompts = [OTHER | others | {"seed": 5}, values]
        return rows_of(
            GenerationConfig.model_validate(BASE[GenerationConfig] | {"prompts": prompts})
        )

    before = rows(own)
    for stage, stale in stale_rows(before, rows(own | {name: change.to})).items():
        # Two prompts with one picture have one row of stage 0, which the other one keeps.
        is_stale = stage in change.stale and len(before[stage]) == 2
        is_stale = is_stale and name != "num_images_per_prompt"  # which only adds rows
        assert stale == ({1} if is_stale else set()), f"stage {stage}"


def run_cases() -> list[Any]:
    return [
        pytest.param(model, *param.values, id=f"{model.__name__}.{param.id}")
        for model in (GenerationConfig, *[m for m in WITHIN if m is not PromptSettings])
        for param in cases(model)
        if param.values[0] != "prompts"
    ]


@pytest.mark.parametrize(("model", "name", "change"), run_cases())
def test_a_runs_setting_makes_all_rows_stale_that_it_shapes(
    model: type[BaseModel], name: str, change: Case
) -> None:
    own: dict[str, Any] = {**BASE[model], **change.beside}
    own |= {} if change.of is AS_BEFORE else {name: change.of}

    def config_of(values: dict[str, Any]) -> GenerationConfig:
        if model in WITHIN:
            values = BASE[GenerationConfig] | {WITHIN[model]: [values]}
        prompts = [dict(prompt) for prompt in values["prompts"]]
        others = {key: prompts[0][key] for key in ("image", "mask_image") if key in prompts[0]}
        prompts.append(OTHER | others)
        return GenerationConfig.model_validate(values | {"prompts": prompts})

    configs = config_of(own), config_of(own | {name: change.to})
    before, after = map(rows_of, configs)
    for stage, stale in stale_rows(before, after).items():
        shaped = {*range(len(before[stage]))} if stage in change.stale else set[int]()
        if name in OF_SEEDS and stage in (2, 3):
            shaped = {
                row
                for row, own_image in enumerate(prompts_and_seeds(configs[0]))
                if own_image not in prompts_and_seeds(configs[1])
            }
        assert stale == shaped, f"stage {stage}"


def prompts_and_seeds(config: GenerationConfig) -> list[tuple[str, int]]:
    texts = [each.prompt for each in config.prompts for _ in range(config.num_images_per_prompt)]
    return list(zip(texts, config.image_seeds(), strict=True))
