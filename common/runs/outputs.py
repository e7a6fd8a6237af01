"""What stage 2 writes: latents and trajectories, and its report."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.declared import LATENTS
from common.files import artifacts
from common.files.artifacts import MADE_BY, Artifact
from common.files.recipe import Recipe, recipe_of_trajectory
from common.files.stage_table import LATENTS_FILE, TRAJECTORY_FILE
from common.runs.generation import GenerationConfig
from common.runs.pictures import IMAGE_LATENTS_MADE_BY
from common.runs.stage_run import StageRun
from common.stopping import StopRequest
from common.whole_files import copy_whole, remove_file

if TYPE_CHECKING:
    from common.sampling.denoising import Denoised


def write_latents(
    run: StageRun,
    config: GenerationConfig,
    recipe: Recipe,
    begin: Artifact | None,
    denoised: "Denoised",
    facts: Mapping[str, Any],
    stop: StopRequest | None = None,
) -> None:
    """Stage 2's end: its files, and its report.

    Args:
        begin: what the latents began with.
        facts: what the report says of the devices.
        stop: asked when all is written.
    """
    path, rows = run.run_dir / LATENTS_FILE, denoised.made.rows
    with run.report.part("writing"):
        names = ("backend", "platform", "mesh")
        devices = {name: facts.get(name) for name in names}
        if rows.places and rows.earlier is not None and rows.earlier.header is not None:
            before = {name: rows.earlier.header.provenance.get(name) for name in names}
            devices = {**devices, "rows_taken": {"rows": len(rows.places), **before}}
            if not rows.missing:
                devices |= before
        provenance = {**provenance_of_latents(run, config, begin), **devices}
        begun = begin if config.pastes else None
        shapes = save_latents(run.run_dir, denoised, recipe, provenance, begun)
        run.settings_written(config)
    if stop is not None:
        stop.raise_if_asked(f"when {path} was written")
    run.finish(
        path,
        shapes=shapes,
        rows_taken=len(rows.places),
        images_of_others=denoised.images_of_others,
        dtype=recipe.settings_of(LATENTS)["unet_dtype"],
        dtype_asked=config.unet_dtype,
        versions=recipe.versions,
        profile=denoised.profile,
        **facts,
    )


def provenance_of_latents(
    run: StageRun, config: GenerationConfig, begin: Artifact | None
) -> dict[str, Any]:
    """Where latents come from, as far as that is known before they are made.

    Args:
        begin: what they begin with.
    """
    found: dict[str, Any] = {**config.model_settings(), "unet_dtype_asked": config.unet_dtype}
    found["overrides"] = run.overrides
    if config.has_pictures and begin is not None and begin.header is not None:
        found[IMAGE_LATENTS_MADE_BY] = begin.header.provenance.get(MADE_BY)
    return found


def save_latents(
    run_dir: Path,
    denoised: "Denoised",
    recipe: Recipe,
    provenance: dict[str, Any],
    begun: Artifact | None = None,
) -> dict[str, list[int]]:
    """Write the latents, and the trajectory in place of another run's.

    Returns the shapes of the latents' tensors.

    Args:
        begun: the pictures that stage 3 pastes into, which it finds beside the latents.
    """
    import torch

    trajectory_file = run_dir / TRAJECTORY_FILE
    remove_file(trajectory_file)
    if begun is not None and begun.path.parent.resolve() != run_dir.resolve():
        copy_whole(begun.path, run_dir / begun.path.name)
    trajectory = denoised.trajectory
    shapes = denoised.made.write(["latents"], recipe, provenance)
    if trajectory is not None and denoised.trajectory_every is not None:
        artifacts.save_tensors(
            trajectory_file,
            {"latents": trajectory, "steps": torch.tensor(denoised.kept_after)},
            recipe_of_trajectory(recipe, denoised.trajectory_every),
            provenance,
        )
    return shapes
