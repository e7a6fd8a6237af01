"""Some pictures of a run as a run of their own, its files made of what is there."""

import os
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path

from common.declared import IMAGE_LATENTS, validate
from common.errors import BadInputFileError, BadSettingError
from common.files import artifacts
from common.files.artifacts import Artifact
from common.files.made_rows import MadeRows
from common.files.recipe import Recipe
from common.files.row_places import layouts_by_ending
from common.files.rows import find_rows
from common.files.run_lock import HELD_BY_PARENT, RUN_LOCK, RunLock
from common.files.stage_table import (
    DECODE,
    DENOISE,
    EMBEDDINGS_FILE,
    IMAGE_LATENTS_FILE,
    LATENTS_FILE,
)
from common.files.tensor_rows import known_names
from common.models.find import open_checkpoint
from common.runs.chosen import parse_images
from common.runs.generation import (
    GenerationConfig,
    read_generation_config,
    write_generation_config,
)
from common.runs.image_latents import find_image_latents, read_inputs
from common.runs.in_turn import plan, run_in_turn
from common.runs.overrides import overrides_of, values_of
from common.runs.picture_names import ids_of
from common.runs.recipes import (
    embeddings_recipe,
    embeddings_rows,
    expected_unet_dtype,
    image_latents_recipe,
    image_latents_rows,
    latents_recipe,
    latents_rows,
)
from common.runs.run_index import read_index, write_index
from common.whole_files import copy_whole


def pick(run_dir: Path, images: str, output_dir: Path) -> tuple[list[int], int]:
    """Make a run of some images of another one, of what is there.

    Returns their indices, and the exit code of stage 3, which puts the pictures in their places.

    Args:
        images: indices and ranges, as 137,140-150.
        output_dir: the new run's.

    Raises:
        BadSettingError: there are no such images, or the new folder has files.
        BadInputFileError: what is to be copied is not there, stale or damaged.
    """
    made, chosen = picked_config(run_dir, images)
    if output_dir.exists() and not (output_dir.is_dir() and not any(output_dir.iterdir())):
        raise BadSettingError(f"--output_dir {output_dir} has files: choose a new folder")
    locks = [RunLock(each, wait=False, names=(RUN_LOCK,)) for each in (run_dir, output_dir)]
    for lock in locks:
        lock.acquire()
    try:
        _copy_artifacts(run_dir, output_dir, made)
        _copy_pictures(run_dir, output_dir, chosen)
        write_generation_config(output_dir, made)
        os.environ[HELD_BY_PARENT] = os.fspath(output_dir.resolve())
        commands = plan({"output_dir": output_dir}, from_stage=DECODE.number)
        return chosen, run_in_turn(commands, None)
    finally:
        for lock in locks:
            lock.release()


def picked_config(run_dir: Path, images: str) -> tuple[GenerationConfig, list[int]]:
    """The settings of a run of some images of another one, as these were made; and which."""
    config = read_generation_config(run_dir)
    for stage in (DENOISE, DECODE):
        config, _ = config.override(values_of(overrides_of(run_dir, stage)))
    if config.has_pictures and config.vae_dtype == "auto":  # which stage 0's report settles
        config, _ = config.override({"vae_dtype": _dtype_of_pictures(run_dir)})
    if config.init_latents is not None:
        raise BadSettingError(
            f"{run_dir} begins with latents of {config.init_latents}, an image each: pick from "
            "that run, and give the new one by --init_latents"
        )
    seeds, ids = config.image_seeds(), ids_of(config, len(config.image_seeds()))
    prompt_of = config.prompt_of_images()
    chosen = parse_images(images, len(seeds), "N,…")
    prompts = []
    for image in chosen:
        prompt, (id, number) = config.prompts[prompt_of[image]].model_dump(), ids[image]
        if id is not None and number is not None:
            prompt["id"] = f"{id}_{number}"
        prompts.append(
            prompt | {"seed": seeds[image], "seeds": None, "num_images_per_prompt": None}
        )
    own = {"num_images_per_prompt": 1, "same_seed": False, "seed_offset": 0}
    values = config.model_dump() | own | {"prompts": prompts}
    return validate(GenerationConfig, values, str(run_dir)), chosen


def _copy_pictures(run_dir: Path, output_dir: Path, chosen: Collection[int]) -> None:
    """Copy images' pictures under their names, to which stage 3 gives those of the new run."""
    lines = [line for line in read_index(run_dir) if line.get("index") in chosen]
    for line in lines:
        if (path := run_dir / line["file"]).exists():
            copy_whole(path, output_dir / path.name)
    write_index(output_dir, lines)


def _copy_artifacts(run_dir: Path, output_dir: Path, config: GenerationConfig) -> None:
    """Write the files that stages exchange, of rows of another run's."""
    checkpoint = open_checkpoint(config, ("unet",))
    recipe = embeddings_recipe(config, checkpoint)
    copy = partial(_copy_rows, run_dir, output_dir)
    embeddings = copy(EMBEDDINGS_FILE, recipe, embeddings_rows(config, recipe))
    begin = None
    if config.has_pictures:
        vae_dtype = _dtype_of_pictures(run_dir)
        inputs = read_inputs(config)
        recipe = image_latents_recipe(config, checkpoint, inputs, vae_dtype)
        copy(IMAGE_LATENTS_FILE, recipe, image_latents_rows(recipe, len(inputs.pictures)))
        begin = find_image_latents(config, checkpoint, output_dir, verify=True)
    dtype = expected_unet_dtype(config.unet_dtype, run_dir / LATENTS_FILE)
    recipe = latents_recipe(config, checkpoint, embeddings, dtype, begin)
    copy(LATENTS_FILE, recipe, latents_rows(config, recipe, embeddings, begin))


def _dtype_of_pictures(run_dir: Path) -> str:
    """The dtype in which a run's pictures were encoded."""
    header = artifacts.inspect(run_dir / IMAGE_LATENTS_FILE).header
    own = {} if header is None else header.recipe.settings_of(IMAGE_LATENTS)
    return str(own.get("vae_dtype", "auto"))


def _copy_rows(
    run_dir: Path, output_dir: Path, name: str, recipe: Recipe, rows: Sequence[Recipe]
) -> Artifact:
    """Write a file of another one's rows.

    Raises:
        BadInputFileError: it has not all of them as they would be made now.
    """
    source = artifacts.inspect(run_dir / name)
    found = find_rows(source.path, rows)
    if found.missing or source.header is None:
        raise BadInputFileError(
            f"{source.path} has not all of these images as they would be made now: "
            f"run it first: ./run_all.sh --output_dir {run_dir}"
        )
    path = output_dir / name
    tensors = next(iter(layouts_by_ending(source).values()))
    names = known_names(name, tensors)
    # What flags overrode is settled here.
    provenance = {**source.header.provenance, "overrides": {}}
    MadeRows(path, found).write(names, recipe, provenance)
    return artifacts.inspect(path)
