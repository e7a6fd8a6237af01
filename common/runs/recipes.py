"""All that determines what each stage makes, and why an output must be made anew.

Settings get into a recipe by their declarations; those that count by what they come to (a file's
content, the seeds of all images, a scheduler's class) are settled here.
"""

from pathlib import Path
from typing import Any

from common.compute.options import RunOptions
from common.conditions.sizes import recorded_sizes
from common.declared import EMBEDDINGS, IMAGE_LATENTS, LATENTS, PICTURES, declarations
from common.errors import BadInputFileError
from common.files import artifacts
from common.files.artifacts import Artifact, Header
from common.files.contracts import trajectory_misfit
from common.files.recipe import (
    Recipe,
    difference,
    package_versions,
    recipe_of_its_latents,
    recipe_of_trajectory,
)
from common.files.report import read_report
from common.files.row_places import layouts_by_ending, row_places
from common.files.rows import OWN, row_hashes, row_recipe
from common.files.run_files import GENERATION_CONFIG_FILE
from common.files.stage_table import (
    DECODE,
    DENOISE,
    EMBEDDINGS_FILE,
    ENCODE,
    ENCODE_PICTURES,
    TRAJECTORY_FILE,
    Stage,
)
from common.files.tensor_rows import row_of_picture
from common.messages import warn
from common.models.checkpoint import Checkpoint
from common.models.component_table import text_encoders
from common.models.lora import lora_settings
from common.models.textual_inversion import embedding_settings
from common.runs.generation import GenerationConfig, RunSettings
from common.runs.image_latents import ReadInputs, cells_of
from common.runs.parts import loras_of_prompts, parts_of
from common.sampling.schedulers import scheduler_choice
from common.vae.vae_settings import in_tiles


def recorded(config: GenerationConfig, artifact: str) -> dict[str, Any]:
    """The settings that shape an artifact and are recorded as they stand."""
    return {
        name: getattr(config, name)
        for name, declared in declarations(RunSettings)
        if declared.recorded and artifact in declared.makes
    }


def embeddings_settings(config: GenerationConfig) -> dict[str, Any]:
    """Those of the embeddings' settings that need no file to be read."""
    return {**config.prompt_texts(), **recorded(config, EMBEDDINGS)}


def embeddings_recipe(config: GenerationConfig, checkpoint: Checkpoint) -> Recipe:
    """All that determines the embeddings."""
    of_prompts = loras_of_prompts(config)
    known = {each: lora_settings(each, text_encoders()) for each in {config.loras, *of_prompts}}
    loras, of_run = [known[each] for each in of_prompts], known[config.loras]
    own = {
        **embeddings_settings(config),
        "text_encoder_loras": of_run,
        "embeddings": embedding_settings(config.embeddings),
        "pipeline": checkpoint.pipeline_class,
        "force_zeros_for_empty_prompt": checkpoint.index().get("force_zeros_for_empty_prompt"),
    }
    if any(each != of_run for each in loras):
        own[OWN] = [{} if each == of_run else {"text_encoder_loras": each} for each in loras]
    return Recipe(
        stage=ENCODE.number,
        settings={EMBEDDINGS: own},
        inputs={},
        weights=checkpoint.fingerprints_for(EMBEDDINGS),
        versions=package_versions(
            *("torch", "transformers", "diffusers", "tokenizers"),
            *(["compel"] if config.prompt_weighting == "compel" else []),
        ),
    )


def embeddings_rows(config: GenerationConfig, recipe: Recipe) -> list[Recipe]:
    """The recipe of each prompt's embeddings."""
    return [row_recipe(recipe, row) for row in range(len(config.prompts))]


def image_latents_recipe(
    config: GenerationConfig, checkpoint: Checkpoint, inputs: ReadInputs, vae_dtype: str
) -> Recipe:
    """All that determines the latents of pictures."""
    shape = (1, 1, *cells_of(config, checkpoint))
    own = {
        **recorded(config, IMAGE_LATENTS),
        **inputs.hashes(),
        "vae_dtype": vae_dtype,
        "tile": in_tiles(config.tile, checkpoint, shape),
    }
    return Recipe(
        stage=ENCODE_PICTURES.number,
        settings={IMAGE_LATENTS: own},
        inputs={},
        weights=checkpoint.fingerprints_for(IMAGE_LATENTS),
        versions=package_versions("torch", "torchax", "jax", "jaxlib", "diffusers", "pillow"),
    )


def latents_recipe(
    config: GenerationConfig,
    checkpoint: Checkpoint,
    embeddings: Artifact,
    unet_dtype: str,
    begin: Artifact | None = None,
) -> Recipe:
    """All that determines the latents.

    Args:
        begin: the latents, or pictures', that they begin with.
    """
    upstream = {EMBEDDINGS: embeddings_settings(config)}
    if embeddings.header is not None:
        upstream = embeddings.header.recipe.settings
    inputs = {EMBEDDINGS_FILE: embeddings.data_sha256}
    init_latents = []  # of each image, or one for all
    if begin is not None and not config.has_pictures:
        init_latents = row_hashes(begin)
    elif begin is not None:
        inputs[begin.path.name] = begin.data_sha256
        if begin.header is not None:
            upstream = {**upstream, **begin.header.recipe.settings}
    own = {
        **_sampling_of(config, checkpoint),
        **_own_of_images(config, checkpoint),
        "num_images_per_prompt": images_of_each(config),
        "unet_loras": lora_settings(config.loras, ("unet",)),
        "vae_scale_factor": checkpoint.vae_scale_factor,
        "seeds": config.image_seeds(),
        "unet_dtype": unet_dtype,
        "init_latents": init_latents,
        **(_scales_of_pictures(checkpoint) if config.has_pictures else {}),
    }
    return Recipe(
        stage=DENOISE.number,
        settings={**upstream, LATENTS: own},
        inputs=inputs,
        weights=checkpoint.fingerprints_for(LATENTS),
        versions=package_versions(
            *("torch", "torchax", "jax", "jaxlib", "diffusers", "scipy", "torchsde"),
        ),
    )


def _sampling_of(config: GenerationConfig, checkpoint: Checkpoint) -> dict[str, Any]:
    """What of the latents' settings a prompt may have of its own, as recipes have it."""
    scheduler, scheduler_options = scheduler_of(config, checkpoint)
    return {
        **recorded(config, LATENTS),
        **recorded_sizes(config, checkpoint.config("unet"), config.model_id),
        "scheduler": scheduler,
        "scheduler_options": scheduler_options,
    }


def _own_of_images(config: GenerationConfig, checkpoint: Checkpoint) -> dict[str, Any]:
    """For each image what of these is not as the run has it; nothing where all are alike."""
    parts = parts_of(config)
    loras = {config.loras, *(part.config.loras for part in parts)}
    added = {each: lora_settings(each, ("unet",)) for each in loras}
    of_run = {**_sampling_of(config, checkpoint), "unet_loras": added[config.loras]}
    found: list[dict[str, Any]] = [{}] * sum(len(part.images) for part in parts)
    for part in parts:
        own = part.config
        of_part = {**_sampling_of(own, checkpoint), "unet_loras": added[own.loras]}
        others = {name: value for name, value in of_part.items() if value != of_run[name]}
        for image in part.images:
            found[image] = others
    return {OWN: found} if any(found) else {}


def images_of_each(config: GenerationConfig) -> int | list[int]:
    """How many images all prompts have, or each of them."""
    counts = config.images_of_prompts()
    return counts if len({*counts}) > 1 else counts[0]


def image_latents_rows(recipe: Recipe, pictures: int) -> list[Recipe]:
    """The recipe of each picture's latents."""
    return [row_recipe(recipe, row) for row in range(pictures)]


def latents_rows(
    config: GenerationConfig, recipe: Recipe, embeddings: Artifact, begin: Artifact | None
) -> list[Recipe]:
    """The recipe of each image's latents, by the rows that it is made from.

    Args:
        recipe: of all of them.
        begin: as `latents_recipe`.
    """
    texts = row_hashes(embeddings)
    pictures = row_hashes(begin) if begin is not None and config.has_pictures else []
    found = []
    for image, prompt in enumerate(config.prompt_of_images()):
        inputs = {EMBEDDINGS_FILE: texts[prompt]}
        if begin is not None and pictures:
            row = row_of_picture(prompt, len(pictures))
            inputs[begin.path.name] = pictures[row]
        found.append(row_recipe(recipe, prompt, image, inputs))
    return found


def _scales_of_pictures(checkpoint: Checkpoint) -> dict[str, Any]:
    """How what stage 0 wrote is scaled for the UNet."""
    vae = checkpoint.config("vae")
    names = ("scaling_factor", "latents_mean", "latents_std")
    scales = {f"vae_{name}": vae.get(name) for name in names}
    return {**scales, "is_cosxl_edit": bool(checkpoint.index().get("is_cosxl_edit"))}


def pictures_recipe(
    config: GenerationConfig,
    checkpoint: Checkpoint,
    latents: Artifact,
    vae_dtype: str,
    begun: Artifact | None = None,
) -> Recipe:
    """All that determines the pictures, what is written into them included.

    Args:
        begun: the pictures that they are pasted into.
    """
    upstream = latents.header.recipe.settings if latents.header is not None else {}
    tiled = {
        ending: in_tiles(config.tile, checkpoint, layouts["latents"].shape)
        for ending, layouts in layouts_by_ending(latents).items()
    }
    tile = any(tiled.values())
    own = {**recorded(config, PICTURES), "vae_dtype": vae_dtype, "tile": tile}
    if len({*tiled.values()}) > 1:
        places = row_places(latents)
        own[OWN] = [{} if tiled[each.ending] == tile else {"tile": not tile} for each in places]
    return Recipe(
        stage=DECODE.number,
        settings={**upstream, PICTURES: own},
        inputs={each.path.name: each.data_sha256 for each in (latents, begun) if each is not None},
        weights=checkpoint.fingerprints_for(PICTURES),
        versions=package_versions("torch", "torchax", "jax", "jaxlib", "diffusers", "pillow"),
    )


def trajectory_pictures_recipe(pictures: Recipe, trajectory: Artifact) -> Recipe:
    """All that determines a trajectory's pictures, by that of the run's pictures."""
    inputs = {TRAJECTORY_FILE: trajectory.data_sha256}
    return pictures.model_copy(update={"inputs": inputs})


def scheduler_of(config: GenerationConfig, checkpoint: Checkpoint) -> tuple[str, dict[str, Any]]:
    """diffusers' class of the scheduler, and its settings besides the checkpoint's own."""
    own = checkpoint.config("scheduler")["_class_name"]
    return scheduler_choice(config.scheduler, config.scheduler_options, own)


# --- a dtype that is left open stands for what it gave -------------------------------------------


def expected_unet_dtype(asked: str, latents_file: Path) -> str:
    """The dtype to expect of fresh latents: `auto` stands for what it gave when they were made."""
    if asked == "auto" and latents_file.exists():
        try:
            header = artifacts.inspect(latents_file, verify=False).header
        except BadInputFileError:
            return asked
        if header is not None and header.provenance.get("unet_dtype_asked") == "auto":
            return str(header.recipe.settings.get(LATENTS, {}).get("unet_dtype", asked))
    return asked


def expected_vae_dtype(asked: str, run_dir: Path, stage: Stage = DECODE) -> str:
    """The dtype to expect of what a VAE made: `auto` stands for what it gave then."""
    report = read_report(run_dir, stage.number)
    if asked == "auto" and report is not None and report.dtype_asked == "auto":
        return report.dtype
    return asked


# --- what does not belong together, and what is stale --------------------------------------------


def prompts_misfit(header: Header | None, config: GenerationConfig) -> str | None:
    """Say where the embeddings were made from other prompts than the run's settings name."""
    if header is None:
        return None
    if header.recipe.stage != ENCODE.number:
        return f"says that stage {header.recipe.stage} made it"
    made = header.recipe.settings.get(EMBEDDINGS, {})
    for name, wanted in embeddings_settings(config).items():
        if made.get(name) != wanted:
            return (
                f"was made with other {name} ({str(made.get(name))[:60]}) than "
                f"{GENERATION_CONFIG_FILE} names ({str(wanted)[:60]})"
            )
    return None


def find_trajectory(source_dir: Path, latents: Artifact, *, verify: bool) -> Artifact | None:
    """The trajectory that belongs to the latents, where stage 2 saved one."""
    path = source_dir / TRAJECTORY_FILE
    if not path.exists():
        return None
    trajectory = artifacts.inspect(path, verify=verify)
    artifacts.refuse_misfit(trajectory, trajectory_misfit(trajectory.tensors, latents.tensors))
    if trajectory.header is not None and latents.header is not None:
        own = recipe_of_its_latents(trajectory.header.recipe)
        if other := difference(own, latents.header.recipe):
            warn(f"{path} is not decoded: it is of other latents ({other})")
            return None
    return trajectory


def why_latents_stale(run_dir: Path, recipe: Recipe, options: RunOptions) -> str | None:
    """Say why stage 2 has to run, or None where all that is asked of it is there and fresh."""
    verify = options.verify
    latents_file, trajectory_file = (run_dir / name for name in DENOISE.writes)
    stale = artifacts.why_stale(latents_file, recipe, verify=verify)
    if stale is None and options.save_trajectory is not None:
        wanted = recipe_of_trajectory(recipe, options.save_trajectory)
        stale = artifacts.why_stale(trajectory_file, wanted, verify=verify)
    return stale or options.why_measure()


def difference_from_report(run_dir: Path, recipe: Recipe) -> str | None:
    """What the last report of stage 3 tells of the pictures' recipe, compared in words."""
    report = read_report(run_dir, DECODE.number)
    if report is None or not report.recipe:
        return None
    try:
        return difference(Recipe(**report.recipe), recipe)
    except ValueError:
        return None  # of an older format
